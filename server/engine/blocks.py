"""The pool of KV blocks: who holds which, and which are kept because their content may be wanted again."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from millrace.server.engine.prefixes import Chain, Prefixes


class BlockPool:
    """`total` blocks of `block_size` tokens: each is unused, owned by one or more, or evictable.

    Evictable blocks are owned by nobody but known by their content (`prefixes`); when unused ones run out, the one
    released longest ago gives way. The accounting identity, unused + owned + evictable = total, holds after every
    call.
    """

    def __init__(self, total: int, block_size: int):
        if total < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: {total} blocks of {block_size} tokens")
        self.total = total
        self.block_size = block_size
        self.prefixes = Prefixes()
        self._unused = list(range(total - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._owners = [0] * total

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._unused) + len(self._evictable)

    @property
    def evictable(self) -> int:
        return len(self._evictable)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each of which has one owner now. ValueError, and no change, if fewer are free."""
        if count > self.free:
            raise ValueError(f"{count} blocks wanted, {self.free} free")
        taken = [self._unused.pop() if self._unused else self._evict() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One owner more for each of the blocks, which are owned or evictable. ValueError on another."""
        for block in blocks:
            if self._owners[block] == 0:
                if block not in self._evictable:
                    raise ValueError(f"block {block} holds nothing to share")
                del self._evictable[block]
            self._owners[block] += 1

    def unowned(self, blocks: Iterable[int]) -> int:
        """How many of the blocks would no longer be free if they were shared."""
        return sum(self._owners[block] == 0 for block in blocks)

    def freed_by(self, blocks: Iterable[int]) -> int:
        """How many of the blocks would be free if one of their owners left them."""
        return sum(self._owners[block] == 1 for block in blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each of the blocks of a sequence, in its order. ValueError on one that nobody owns."""
        for block in reversed(blocks):  # so that a text is evicted from its end: a beginning is of use without it
            if self._owners[block] == 0:
                raise ValueError(f"block {block} is released twice")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if self.prefixes.leave(block):
                    self._evictable[block] = None
                else:
                    self._unused.append(block)

    def publish(self, chain: Chain, index: int, before: int, block: int) -> int | None:
        """As `Prefixes.add`; an orphan of that name makes way, and so does a block of that content that nobody owns."""
        orphan = self.prefixes.orphan(chain, index)
        if orphan is not None:
            self.prefixes.forget(orphan)
            self._discard(orphan)
        serial = self.prefixes.add(chain, index, before, block)
        known = self.prefixes.known_block(chain, index)
        if serial is not None and known in self._evictable:
            self.prefixes.leave(known)  # to its heir, this block
            self._discard(known)
        return serial

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the identity holds and `holders` hold exactly what is owned."""
        held = Counter(block for blocks in holders for block in blocks)
        unused = set(self._unused)
        if len(unused) != len(self._unused):
            raise AssertionError("a block is unused twice")
        kinds = (unused, held.keys(), self._evictable.keys())
        if sum(map(len, kinds)) != self.total or len(set().union(*kinds)) != self.total:
            raise AssertionError(
                f"{len(unused)} unused + {len(held)} owned + {self.evictable} evictable != {self.total} blocks"
            )
        for block, owners in enumerate(self._owners):
            if owners != held[block]:
                raise AssertionError(f"block {block} counts {owners} owners and has {held[block]}")
        if any(block not in self.prefixes for block in self._evictable) or any(b in self.prefixes for b in unused):
            raise AssertionError("what is evictable is known, and what is unused is not")

    def _discard(self, block: int) -> None:
        """Nothing leads to the block any more; if it was kept, it is unused now."""
        if block in self._evictable:
            del self._evictable[block]
            self._unused.append(block)

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        self.prefixes.forget(block)
        return block

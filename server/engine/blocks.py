"""The pool of KV blocks: who holds which, and nothing of what is in them."""

from collections import Counter
from collections.abc import Iterable


class BlockPool:
    """`total` blocks of `block_size` tokens, each free or with one owner.

    The accounting identity, free + owned = total, holds after every call. The block freed last is handed out
    first.
    """

    def __init__(self, total: int, block_size: int):
        if total < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: {total} blocks of {block_size} tokens")
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))
        self._owned = [False] * total

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each which are owned now. ValueError, and no change, if fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owned[block] = True
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Free blocks. ValueError on a free one."""
        for block in blocks:
            if not self._owned[block]:
                raise ValueError(f"block {block} is released twice")
            self._owned[block] = False
            self._free.append(block)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the identity holds and `holders` hold exactly what is owned."""
        held = Counter(block for blocks in holders for block in blocks)
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is in the free list twice")
        if len(free) + len(held) != self.total or free & held.keys():
            raise AssertionError(f"{len(free)} free + {len(held)} owned != {self.total} blocks")
        for block, owned in enumerate(self._owned):
            if owned != held[block]:
                raise AssertionError(f"block {block} is {'owned' if owned else 'free'} and has {held[block]} holders")

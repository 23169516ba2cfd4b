"""The pool of KV blocks: who holds which, and nothing of what is in them."""

from collections import Counter
from collections.abc import Iterable


class BlockPool:
    """`total` blocks of `block_size` tokens, each with a count of its owners.

    The accounting identity, free + owned + evictable = total, holds after every call. Nothing is evictable:
    a block that loses its last owner is free at once. The block freed last is handed out first.
    """

    def __init__(self, total: int, block_size: int):
        if total < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: {total} blocks of {block_size} tokens")
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))
        self._owners = [0] * total

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one owner. ValueError, and no change, if fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that have one. ValueError on a free block."""
        for block in blocks:
            if self._owners[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take an owner away; the last one frees the block. ValueError on a free block."""
        for block in blocks:
            if self._owners[block] == 0:
                raise ValueError(f"block {block} is released twice")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free.append(block)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the identity holds and `holders` hold exactly what is owned."""
        held = Counter(block for blocks in holders for block in blocks)
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is in the free list twice")
        if len(free) + len(held) != self.total or free & held.keys():
            raise AssertionError(f"{len(free)} free + {len(held)} owned != {self.total} blocks")
        for block, owners in enumerate(self._owners):
            if owners != held[block]:
                raise AssertionError(f"block {block} counts {owners} owners and has {held[block]}")

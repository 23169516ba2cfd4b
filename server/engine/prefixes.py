"""Which KV blocks hold which beginnings of texts, so that equal ones are computed once.

A full block is known by a digest chained over everything before it: SHA-256 of its predecessor's digest and its own
tokens, beginning with the tenant, who is part of every name: no tenant finds, or can time, what another one computed.
A salt, which a request may add, keeps it apart from others of its tenant.
A digest only finds; tokens and predecessor are compared, so equal digests of different texts harm nobody.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple


class Prefix(NamedTuple):
    """A block that is found again. `serial` is its own for good: a block number may come back with other content."""

    block: int
    serial: int
    before: int  # serial of the predecessor; of a first block, 0
    scope: tuple[str, str]
    tokens: bytes


class Chain:
    """The digests of one sequence's full blocks, as far as its tokens are known.

    Only chains of equal tenant and equal salt, which a request may choose to share less, have blocks in common.
    """

    def __init__(self, tenant: str, block_size: int, salt: str = ""):
        self.scope, self.block_size = (tenant, salt), block_size
        name = tenant.encode()
        self._root = sha256(len(name).to_bytes(8, "little") + name + salt.encode()).digest()
        self._links: list[tuple[bytes, bytes]] = []  # digest and tokens of each block

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the blocks that `tokens` fill, which follow those of the chain."""
        for start in range(0, len(tokens), self.block_size):
            content = array("i", tokens[start : start + self.block_size]).tobytes()
            before = self._links[-1][0] if self._links else self._root
            self._links.append((sha256(before + content).digest(), content))

    def __len__(self) -> int:
        return len(self._links)

    def __getitem__(self, index: int) -> tuple[bytes, bytes]:
        return self._links[index]


class Prefixes:
    """The known blocks by digest. Whoever holds or keeps the blocks is the pool's affair."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, Prefix] = {}
        self._digests: dict[int, bytes] = {}  # of blocks
        self._copies: dict[bytes, list[int]] = {}  # other blocks of known content, which somebody computed meanwhile
        self._copied: dict[int, bytes] = {}  # their digests
        self._alive = {0}  # serials; 0 is the beginning of every text
        self._serial = 0

    def __contains__(self, block: int) -> bool:
        return block in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, chain: Chain, most: int) -> list[Prefix]:
        """The longest known beginning of a chain, of at most `most` blocks."""
        found: list[Prefix] = []
        before = 0
        for index in range(min(most, len(chain))):
            prefix = self._known(chain, index, before)
            if prefix is None:
                break
            found.append(prefix)
            before = prefix.serial
        return found

    def add(self, chain: Chain, index: int, before: int, block: int) -> int | None:
        """Make a block known that follows `before`; returns the serial that its successor follows.

        Where another block of the same content is known, that one stays, and this one takes over when it is left
        first. None: the digest is taken by other content, and what follows cannot be known either.
        """
        digest, tokens = chain[index]
        if digest in self._by_digest:
            known = self._known(chain, index, before)
            if known is None:
                return None
            self._copies.setdefault(digest, []).append(block)
            self._copied[block] = digest
            return known.serial
        self._serial += 1
        self._alive.add(self._serial)
        self._by_digest[digest] = Prefix(block, self._serial, before, chain.scope, tokens)
        self._digests[block] = digest
        return self._serial

    def leave(self, block: int) -> bool:
        """Nobody holds the block any more. Whether it is worth keeping: known, and the only one of its content."""
        if block in self._copied:
            digest = self._copied.pop(block)
            self._copies[digest].remove(block)
            return False
        if block not in self._digests:
            return False
        digest = self._digests[block]
        if not self._copies.get(digest):
            return True
        heir = self._copies[digest].pop()
        del self._copied[heir], self._digests[block]
        self._digests[heir] = digest
        self._by_digest[digest] = self._by_digest[digest]._replace(block=heir)
        return False

    def forget(self, block: int) -> None:
        """The block will hold something else. Those that follow it are found no more."""
        digest = self._digests.pop(block)
        self._alive.remove(self._by_digest.pop(digest).serial)
        for copy in self._copies.pop(digest, ()):
            del self._copied[copy]

    def known_block(self, chain: Chain, index: int) -> int:
        """The block that has this digest, which is taken."""
        return self._by_digest[chain[index][0]].block

    def orphan(self, chain: Chain, index: int) -> int | None:
        """The block that has this digest but whose predecessor is forgotten, so that nothing leads to it."""
        prefix = self._by_digest.get(chain[index][0])
        return prefix.block if prefix and prefix.before not in self._alive else None

    def _known(self, chain: Chain, index: int, before: int) -> Prefix | None:
        digest, tokens = chain[index]
        prefix = self._by_digest.get(digest)
        if prefix is None or (prefix.before, prefix.scope, prefix.tokens) != (before, chain.scope, tokens):
            return None
        return prefix

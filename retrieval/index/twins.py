"""Labels whose vectors are equal, as those of boilerplate are."""

import hashlib
from collections.abc import Iterable

import numpy as np

from millrace.retrieval.index.base import Float32, Labels


class Twins:
    """One label of each distinct vector leads; the others follow it.

    In a graph, many copies of a vector would link to each other alone: searches get lost among them, or never
    find them (with a fifth of the vectors copies of five, recall@10 fell from 0.998 to 0.85).

    One writer; `expand` may run beside it.
    """

    def __init__(self) -> None:
        self._leader: dict[bytes, int] = {}
        self._followers: dict[int, list[int]] = {}  # of those leaders that have any

    def add(self, labels: Labels, units: Float32) -> Labels:
        """Labels must be new. Returns those that lead."""
        leading = []
        for label, unit in zip(labels.tolist(), units, strict=True):
            leader = self._leader.setdefault(_key(unit), label)
            if leader == label:
                leading.append(label)
            else:
                self._followers.setdefault(leader, []).append(label)
        return np.array(leading, np.uint64)

    def remove(self, label: int, unit: Float32) -> tuple[int | None, int | None]:
        """Which leader this ends, and which label leads in its place."""
        key = _key(unit)
        leader = self._leader[key]
        followers = self._followers.get(leader, [])
        if label != leader:
            followers.remove(label)
            return None, None
        self._followers.pop(leader, None)
        if not followers:
            del self._leader[key]
            return leader, None
        self._leader[key], *rest = followers
        if rest:
            self._followers[followers[0]] = rest
        return leader, followers[0]

    def expand(self, leaders: Labels) -> Labels:
        """These, and all that follow them."""
        if not self._followers:
            return leaders
        found = [follower for leader in leaders.tolist() for follower in self._followers.get(leader, ())]
        return np.concatenate([leaders, np.array(found, np.uint64)])

    def followers(self) -> Labels:
        """[n, 2]: each follower and its leader."""
        pairs: Iterable[tuple[int, int]] = (
            (follower, leader) for leader, followers in self._followers.items() for follower in followers
        )
        return np.array(list(pairs), np.uint64).reshape(-1, 2)


def _key(unit: Float32) -> bytes:
    return hashlib.blake2b(unit.data, digest_size=16).digest()

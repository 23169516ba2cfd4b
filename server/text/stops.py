"""Stop strings in a text stream."""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from millrace.server.text.holdback import Piece


class _State(NamedTuple):
    """A node of the automaton: a prefix of some stop string, which is also the longest suffix of the text read."""

    depth: int
    next: dict[str, int]
    fallback: int
    stop: str  # the longest stop string that ends here, or ""


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> list[_State]:
    """Aho and Corasick, "Efficient string matching" (1975)."""
    tries: list[dict[str, int]] = [{}]
    depths, ends = [0], [""]
    for stop in stops:
        node = 0
        for character in stop:
            if character not in tries[node]:
                tries[node][character] = len(tries)
                tries.append({})
                depths.append(depths[node] + 1)
                ends.append("")
            node = tries[node][character]
        ends[node] = stop
    fallbacks = [0] * len(tries)
    queue = deque(tries[0].values())
    while queue:
        node = queue.popleft()
        ends[node] = ends[node] or ends[fallbacks[node]]
        for character, child in tries[node].items():
            candidate = fallbacks[node]
            while candidate and character not in tries[candidate]:
                candidate = fallbacks[candidate]
            fallbacks[child] = tries[candidate].get(character, 0)
            queue.append(child)
    return [_State(*state) for state in zip(depths, tries, fallbacks, ends, strict=True)]


class StopMatcher:
    """A stage that ends the text at the first stop string: the match that ends earliest, the longest of these.

    Held is the longest tail that begins a stop string. Time is linear in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        """`stops` are not empty strings; `include` keeps the match in the text."""
        if "" in stops:
            raise ValueError("an empty stop string")
        self._states = _automaton(tuple(stops))
        self._include = include
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> list[Piece]:
        if self.matched is not None:
            return []
        for i, character in enumerate(text):
            stop = self._step(character)
            if stop:
                self.matched = stop
                return self._release(self._held + text[: i + 1], 0 if self._include else len(stop))
        return self._release(self._held + text, self._states[self._state].depth)

    def finish(self) -> list[Piece]:
        return self._release(self._held, 0) if self.matched is None else []

    def _step(self, character: str) -> str:
        states = self._states
        state = states[self._state]
        while state.depth and character not in state.next:
            state = states[state.fallback]
        self._state = state.next.get(character, 0)
        return states[self._state].stop

    def _release(self, text: str, keep: int) -> list[Piece]:
        cut = len(text) - keep
        self._held = text[cut:]
        return [Piece(text[:cut], cut)] if cut else []

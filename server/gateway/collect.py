"""A stream folded into one answer."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from millrace.server.types import ChoiceDelta, Citation, Completed, Deltas, Finish, GenerateEvent, Logprobs, Started


@dataclass(slots=True)
class CollectedChoice:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Collected:
    """A whole answer; `choices` by index, `citations` in the order in which they came."""

    started: Started
    choices: list[CollectedChoice]
    completed: Completed
    citations: tuple[Citation, ...] = ()


def collect(events: Iterable[GenerateEvent]) -> Collected:
    """Fold a complete stream. ValueError if it does not begin with Started and end with Completed."""
    first, *middle, last = events
    if not (isinstance(first, Started) and isinstance(last, Completed)):
        raise ValueError(f"a stream goes from Started to Completed, not from {first} to {last}")
    parts: list[list[ChoiceDelta]] = [[] for _ in range(first.n)]
    citations: list[Citation] = []
    for event in middle:
        if isinstance(event, Citation):
            citations.append(event)
            continue
        if not isinstance(event, Deltas):
            raise ValueError(f"{event} in the middle of a stream")
        for delta in event.choices:
            parts[delta.index].append(delta)
    return Collected(first, [_join(index, deltas) for index, deltas in enumerate(parts)], last, tuple(citations))


def _join(index: int, deltas: list[ChoiceDelta]) -> CollectedChoice:
    choice = CollectedChoice(index, text="".join(delta.text for delta in deltas))
    for delta in deltas:
        choice.token_ids += delta.token_ids
        choice.finish = delta.finish or choice.finish
        if delta.logprobs:
            choice.logprobs = choice.logprobs or Logprobs(delta.logprobs.top_n)
            choice.logprobs.extend(delta.logprobs)
    return choice

"""When sequences are over, however far they have come."""

from collections.abc import Iterator

from millrace.server.engine.heap import Heap
from millrace.server.engine.sequence import Sequence, SequenceFinished
from millrace.server.errors import DeadlineExceeded, QueueTimeout
from millrace.server.types import FinishReason


class Deadlines:
    """The live sequences whose time is limited: by a deadline, a time limit, or while none of the request runs."""

    def __init__(self) -> None:
        self._ends: Heap[Sequence] = Heap()

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._ends)

    def note(self, sequence: Sequence) -> None:
        """A sequence is live, or a sequence of its request runs for the first time."""
        if sequence.end_us is None:
            self._ends.remove(sequence)
        else:
            self._ends.put(sequence, (sequence.end_us, sequence.arrival))

    def forget(self, sequence: Sequence) -> None:
        """Idempotent."""
        self._ends.remove(sequence)

    def expired(self, now_us: int) -> Iterator[Sequence]:
        """Those that are over and not forgotten, the earliest first."""
        while (sequence := self._ends.first()) is not None and self._ends.key(sequence)[0] <= now_us:
            yield sequence


def last_word(sequence: Sequence, now_us: int) -> SequenceFinished:
    """Of one whose time is over."""
    request, age_us = sequence.request, now_us - sequence.arrival_us
    if request.deadline_us is not None and age_us >= request.deadline_us:
        text = f"the deadline passed after {request.deadline_us / 1e6:g} s"
        return sequence.finished(None, error=DeadlineExceeded(text))
    if request.time_limit_us is not None and age_us >= request.time_limit_us:
        return sequence.finished(FinishReason.TIME_LIMIT)
    text = f"it did not run within its queue_timeout of {(request.queue_timeout_us or 0) / 1e6:g} s; retry later"
    return sequence.finished(None, error=QueueTimeout(text))

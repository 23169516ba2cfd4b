"""What a step consists of, and within which bounds."""

from dataclasses import dataclass, field

from millrace.server.engine import loops
from millrace.server.engine.row import Row
from millrace.server.engine.sequence import Sequence
from millrace.server.engine.step_time import UNLIMITED, Work


@dataclass(frozen=True, slots=True)
class Limits:
    """Counts of sequences and tokens, and microseconds.

    The bounds on the queue apply to arrivals, not to preempted sequences. `max_step_us` bounds the prompt tokens of a
    step by the time that they are expected to take; None: nothing does. `ageing_us`: how long a sequence waits in a
    class of priority before it moves up. `prefix_caching`: whether sequences of a tenant share the blocks of equal
    beginnings.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    prefix_caching: bool = True
    max_queued_of_tenant: int = UNLIMITED
    max_running_of_tenant: int = UNLIMITED
    max_step_us: int | None = None
    ageing_us: int = 60_000_000

    @property
    def lanes(self) -> int:
        """Sequences that run at once: every one of them can decode in every step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


@dataclass(slots=True)
class Plan:
    """One step. `admitted` got their lane in it, `grown` their last block; first of all `copies` of blocks (source,
    target) are made."""

    step: int
    rows: list[Row] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    decode_tokens: int = 0
    prefill_tokens: int = 0
    attention: int = 0  # sum over its tokens of the tokens that each looks at

    def add_decodes(self, decoding: list[Sequence]) -> None:
        """One token of each; no other row may be there yet."""
        self.rows, self.attention, unpaid, outputs = loops.plan_decodes(self.step, decoding)
        self.decode_tokens = len(self.rows)
        for tenant in unpaid:
            tenant.charge(1, 0)
        for tenant, tokens in outputs:
            tenant.charge(0, tokens)

    def add(self, sequence: Sequence, count: int) -> None:
        """The next `count` tokens of a sequence that lacks more than one."""
        start, end = sequence.scheduled, sequence.scheduled + count
        samples = end == sequence.length
        self.rows.append(Row(sequence, start, end, samples, sequence.source if sequence.pending else None))
        self.attention += count * (start + end + 1) // 2
        sequence.scheduled = end
        sequence.in_flight += 1
        charge(sequence, start, end)
        if samples:
            sequence.source = (self.step, len(self.rows) - 1)
            sequence.pending += 1
            sequence.length += 1
        self.prefill_tokens += count

    def drop(self, sequence: Sequence) -> None:
        """A sequence that has no row in it gives way after all."""
        self.admitted = [one for one in self.admitted if one is not sequence]
        self.grown = [one for one in self.grown if one is not sequence]
        self.copies = [copy for copy in self.copies if copy[1] not in sequence.blocks]

    @property
    def work(self) -> Work:
        return Work(self.prefill_tokens, self.decode_tokens, self.attention)


def charge(sequence: Sequence, start: int, end: int) -> None:
    """Tokens [start, end) are computed; again, after it gave way or a step was lost, they cost nothing."""
    start = max(start, sequence.charged)
    if start >= end:
        return
    prompt = max(0, min(end, sequence.prompt_len) - start)
    sequence.tenant.charge(prompt, end - start - prompt)
    sequence.charged = end

"""What a step consists of, and within which bounds."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from millrace.server.engine.sequence import Sequence
from millrace.server.engine.step_time import Work

MANY = 1 << 30


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
    max_queued_of_tenant: int = MANY
    max_running_of_tenant: int = MANY
    max_step_us: int | None = None
    ageing_us: int = 60_000_000

    @property
    def lanes(self) -> int:
        """Sequences that run at once: every one of them can decode in every step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


class Row(NamedTuple):
    """Tokens [start, end) of a sequence; with `source` the last of them is being sampled by (step, row)."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    source: tuple[int, int] | None


new_row = partial(tuple.__new__, Row)  # a Row of a tuple, in half the time


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

    def drop(self, sequence: Sequence) -> None:
        """A sequence that has no row in it gives way after all."""
        self.admitted = [one for one in self.admitted if one is not sequence]
        self.grown = [one for one in self.grown if one is not sequence]
        self.copies = [copy for copy in self.copies if copy[1] not in sequence.blocks]

    @property
    def work(self) -> Work:
        return Work(self.prefill_tokens, self.decode_tokens, self.attention)

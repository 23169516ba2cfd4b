"""What a step consists of, and within which bounds."""

from dataclasses import dataclass, field
from typing import NamedTuple

from millrace.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """Counts of sequences and tokens. The bounds on the queue apply to arrivals, not to preempted sequences.

    `prefix_caching`: whether sequences of a tenant share the blocks of equal beginnings.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    prefix_caching: bool = True

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


@dataclass(slots=True)
class Plan:
    """One step. `admitted` got their lane in it, `grown` their last block."""

    step: int
    rows: list[Row] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    decode_tokens: int = 0
    prefill_tokens: int = 0

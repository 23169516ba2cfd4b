"""What one sequence has in a step."""

from typing import NamedTuple

from millrace.server.engine.sequence import Sequence


class Row(NamedTuple):
    """Tokens [start, end) of a sequence; with `source` the last of them is being sampled by (step, row)."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    source: tuple[int, int] | None

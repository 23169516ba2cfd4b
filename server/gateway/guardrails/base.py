"""The seam of a guard: it finds what must not pass in a text, and takes it out of a text or of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from millrace.server.text.holdback import Stage


@dataclass(frozen=True, slots=True)
class Finding:
    """What stands in characters [start, end) of the text that was inspected."""

    category: str
    start: int
    end: int


class Guard(Protocol):
    """Safe for use by several threads and streams at once; a Stage belongs to one stream."""

    def inspect(self, text: str) -> list[Finding]:
        """Findings in order; none overlaps another."""
        ...

    def cover(self, text: str, findings: Sequence[Finding]) -> str:
        """The text with a mask in place of each of these findings, which are in order and do not overlap."""
        ...

    def mask(self, text: str) -> str:
        """The text with a mask in place of each finding."""
        ...

    def stream(self) -> Stage:
        """A stage whose joined output is mask() of the joined input, however it is cut."""
        ...

"""The hold-back pipeline: stages that read and rewrite a text stream, and know what each output stands for.

A stage may keep a bounded tail until it can no longer be the start of what it looks for. It may copy, replace or
delete text; the pipeline follows, through all stages, how much of the original text is settled, which tells the
tokens that may go out with it.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """`text` goes on; it stands for the next `source` characters of the stage's input.

    With equal lengths it stands for them one by one, otherwise as a whole: nothing of the input counts as settled
    before all of `text` is. An empty text deletes its source.
    """

    text: str
    source: int


class Stage(Protocol):
    """The result must not depend on how the text is cut into pushes; no state may grow with the stream."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """What was held, now that nothing follows."""
        ...


class _Link:
    """A stage and the pieces of its output that are not settled yet: [characters left, source]."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self._open: deque[tuple[int, int]] = deque()

    def run(self, text: str, last: bool) -> str:
        pieces = self.stage.push(text) if text else []
        if last:
            pieces = pieces + self.stage.finish()
        self._open.extend((len(piece.text), piece.source) for piece in pieces)
        return "".join(piece.text for piece in pieces)

    def settle(self, count: int) -> int:
        """`count` more characters of the output are settled: how many of the input are."""
        settled = 0
        while self._open and self._open[0][0] <= count:
            length, source = self._open.popleft()
            count, settled = count - length, settled + source
        if count:
            length, source = self._open.popleft()
            one_by_one = count if length == source else 0
            self._open.appendleft((length - count, source - one_by_one))
            settled += one_by_one
        return settled


class Pipeline:
    """Stages in the order in which the text meets them."""

    def __init__(self, stages: Sequence[Stage]):
        self._links = [_Link(stage) for stage in stages]

    def push(self, text: str, last: bool = False) -> tuple[str, int]:
        """Text to send, and how many more characters of the original text are settled by it."""
        for link in self._links:
            text = link.run(text, last)
        settled = len(text)
        for link in reversed(self._links):
            settled = link.settle(settled)
        return text, settled


class Rewritten(NamedTuple):
    """A whole text after a stage: the texts of `pieces`, in order."""

    text: str
    pieces: Sequence[Piece]

    def place(self, start: int, end: int) -> tuple[int, int]:
        """Where characters [start, end) of the input are now; what they share with a replacement counts whole."""
        return self._edge(start, at_end=False), self._edge(end, at_end=True)

    def _edge(self, position: int, at_end: bool) -> int:
        written = 0
        for text, source in self.pieces:
            if position < source or (at_end and position == source):
                one_by_one = len(text) == source
                return written + (position if one_by_one else len(text) if at_end and position else 0)
            position, written = position - source, written + len(text)
        return written


def rewrite(stage: Stage, text: str) -> Rewritten:
    """Run all of a text through a new stage."""
    pieces: list[Piece] = []
    begun = ""  # pieces that stand for nothing belong to the next one
    for piece in [*stage.push(text), *stage.finish()]:
        begun += piece.text
        if piece.source:
            pieces.append(Piece(begun, piece.source))
            begun = ""
    pieces += [Piece(begun, 0)] if begun else []
    return Rewritten("".join(piece.text for piece in pieces), pieces)

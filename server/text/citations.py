"""Markers `[n]` in a text stream, by which a model names the sources of what it says.

A marker is one to fifty numbers of one to three digits without leading zeros, in brackets, parted by commas and at
most one space: `[1]`, `[1, 3]`; `[1][3]` are two. Numbers that name no source are taken out, and a marker that is
left with none goes with one space before it. Anything else in brackets is text: `[0]`, `[note]`, `[1990]`, `[a1]`.
"""

import re
from collections import deque
from typing import NamedTuple

from millrace.server.text.holdback import Piece, Stage

NUMBER = r"[1-9][0-9]{0,2}"
OPEN = re.compile(rf" ?(?:\[(?:{NUMBER}, ?){{0,49}}(?:{NUMBER})?)?")  # whatever a marker may begin with
MARKER = re.compile(rf" ?\[{NUMBER}(?:, ?{NUMBER}){{0,49}}\]")
STATEMENT = 1000  # characters of a statement that are remembered


class Marked(NamedTuple):
    """A marker names the sources `numbers`, each once, and is characters (of Places: bytes) [start, end) of a text.

    `statement` is the sentence that it ends or follows, without markers.
    """

    numbers: tuple[int, ...]
    start: int
    end: int
    statement: str


class CitationMarkers:
    """A stage after which no marker names anything but a source, 1 to `sources`. `found`: those left, in its output.

    Held is the longest tail that may begin a marker.
    """

    def __init__(self, sources: int):
        self._sources = sources
        self._held = ""
        self._tail = ""  # of the output: the beginning of what would be a marker, were it whole
        self._position = 0  # characters of output
        self._statement = Statement()
        self.found: deque[Marked] = deque()

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for character in text:
            candidate = self._held + character
            if OPEN.fullmatch(candidate):
                self._held = candidate
            elif MARKER.fullmatch(candidate):
                self._held = ""
                pieces.append(self._mark(candidate))
            else:
                pieces += self._plain(self._give_up(character))
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        return self._plain(held)

    def _give_up(self, character: str) -> str:
        """What is text for sure now that `character` has come; what may begin a marker anew is held."""
        text = self._held + character
        start = len(text) - (2 if text.endswith(" [") else 1 if character in " [" else 0)
        self._held = text[start:]
        return text[:start]

    def _mark(self, marker: str) -> Piece:
        """The marker with the numbers of sources in it, each of them found, or nothing."""
        numbers = [int(number) for number in re.findall(NUMBER, marker)]
        named = [number for number in numbers if number <= self._sources]
        if not named:
            return Piece("", len(marker))
        space = " " if marker.startswith(" ") else ""
        kept = marker if named == numbers else f"{space}[{', '.join(map(str, named))}]"
        start, self._position = self._position + len(space), self._position + len(kept)
        self.found.append(Marked(tuple(dict.fromkeys(named)), start, self._position, str(self._statement)))
        self._tail = ""
        return Piece(kept, len(marker))

    def _plain(self, text: str) -> list[Piece]:
        """Text as it is, but for a bracket that would close a marker which only a removal has put together."""
        pieces, start = [], 0
        for i, character in enumerate(text):
            joined = self._tail + character
            if MARKER.fullmatch(joined):
                pieces += [Piece(text[start:i], i - start), Piece("", 1)]
                start = i + 1
                continue
            self._tail = joined if OPEN.fullmatch(joined) else character if character in " [" else ""
            self._position += 1
            self._statement.add(character)
        return [*pieces, Piece(text[start:], len(text) - start)] if text[start:] else pieces


class Places:
    """The stage after CitationMarkers: where the markers are in what `stage`, if there is one, makes of the text.

    `stage` leaves markers alone. What masks comes here, not before the markers: where one is taken out, the text
    around it joins.
    """

    def __init__(self, markers: CitationMarkers, stage: Stage | None):
        self._open, self._stage = markers.found, stage
        self._read = 0  # characters
        self._written = 0  # bytes
        self._start: int | None = None  # of the first open marker, once it has gone out
        self.found: deque[Marked] = deque()

    def push(self, text: str) -> list[Piece]:
        return self._placed(self._stage.push(text) if self._stage else [Piece(text, len(text))])

    def finish(self) -> list[Piece]:
        return self._placed(self._stage.finish() if self._stage else [])

    def _placed(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            end = self._read + piece.source
            while self._open:
                marked = self._open[0]
                if self._start is None and marked.start < end:
                    self._start = self._place(marked.start, piece)
                elif self._start is not None and marked.end <= end:
                    place = self._place(marked.end, piece)
                    self.found.append(self._open.popleft()._replace(start=self._start, end=place))
                    self._start = None
                else:
                    break
            self._read, self._written = end, self._written + len(piece.text.encode())
        return pieces

    def _place(self, position: int, piece: Piece) -> int:
        return self._written + len(piece.text[: position - self._read].encode())


class Statement:
    """The sentence that a text has come to: it begins anew with the first letter after an end and a space."""

    def __init__(self) -> None:
        self._text: deque[str] = deque(maxlen=STATEMENT)
        self._last = ""  # character that is no space
        self._ended = False

    def __str__(self) -> str:
        return "".join(self._text).strip()

    def add(self, character: str) -> None:
        if character.isspace():
            self._ended |= character == "\n" or self._last in ".!?…。！？"
        elif self._ended and character.isalnum():
            self._text.clear()
            self._ended = False
        if not character.isspace():
            self._last = character
        self._text.append(character)

"""Text in pieces, put together to paragraphs, headings, lists and tables as Markdown writes them."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

LARGEST_ROW = 2_000  # characters; a longer row is layout, not data, and its cells are paragraphs
DEEPEST_LIST = 8  # levels that are indented
BREAK = "\x1f"  # a line break in collected text, where white space means nothing; decoded text has none of these
LINES = re.compile(r"\n{3,}")
BACKTICKS = re.compile(r"`{3,}")


class Block(NamedTuple):
    text: str
    kind: str = ""  # "item", "row" or ""; two of a kind stand on consecutive lines


@dataclass(slots=True)
class _Row:
    cells: list[list[Block]] = field(default_factory=list)
    is_header: bool = True
    in_cell: bool = False


class Writer:
    """Collects text and turns it into blocks; those of a table's cell are kept apart until its row ends."""

    def __init__(self) -> None:
        self._sinks: list[list[Block]] = [[]]
        self._text: list[str] = []
        self._rows: list[_Row] = []
        self._lists: list[int | None] = []  # open lists; of a numbered one, its last number
        self._mark = self._kind = ""  # of the next block

    def write(self, text: str) -> None:
        self._text.append(text)

    def end_block(self) -> None:
        text = "\n".join(" ".join(line.split()) for line in "".join(self._text).split(BREAK)).strip()
        self._text.clear()
        if text:
            if self._mark.startswith("#"):
                text = text.replace("\n", " ")
            self._put(Block(self._mark + LINES.sub("\n\n", text), self._kind))
            self._mark = self._kind = ""

    def end_verbatim(self) -> None:
        text = "".join(self._text).replace(BREAK, "\n").strip("\r\n").rstrip()
        self._text.clear()
        if text:
            fence = "`" * (max((len(run) for run in BACKTICKS.findall(text)), default=2) + 1)
            self._put(Block(f"{self._mark}{fence}\n{text}\n{fence}"))
            self._mark = self._kind = ""

    def mark(self, mark: str, kind: str = "") -> None:
        self._mark, self._kind = mark, kind

    def open_list(self, numbered: bool) -> None:
        self._lists.append(0 if numbered else None)

    def close_list(self) -> None:
        self._lists.pop()

    def open_item(self) -> None:
        marker = "- "
        if self._lists and (last := self._lists[-1]) is not None:
            self._lists[-1] = last + 1
            marker = f"{last + 1}. "
        self.mark("  " * (min(len(self._lists), DEEPEST_LIST) - 1) + marker, "item")

    def open_row(self) -> None:
        self._rows.append(_Row())

    def open_cell(self, is_header: bool) -> bool:
        """Whether there is a row for it."""
        if not self._rows or self._rows[-1].in_cell:
            return False
        self._rows[-1].in_cell = True
        self._rows[-1].is_header &= is_header
        self._sinks.append([])
        return True

    def close_cell(self) -> None:
        self._rows[-1].in_cell = False
        self._rows[-1].cells.append(self._sinks.pop())

    def close_row(self) -> None:
        row = self._rows.pop()
        cells = [" ".join(" ".join(block.text.split()) for block in cell) for cell in row.cells]
        if len(cells) < 2 or not any(cells) or sum(map(len, cells)) > LARGEST_ROW:
            self._sinks[-1] += [block for cell in row.cells for block in cell]
            return
        self._put(Block(f"| {' | '.join(cells)} |", "row"))
        if row.is_header:
            self._put(Block("|" + " --- |" * len(cells), "row"))

    def _put(self, block: Block) -> None:
        self._sinks[-1].append(block)

    def result(self) -> str:
        parts: list[str] = []
        last = ""
        for text, kind in self._sinks[0]:
            parts += ("\n" if kind and kind == last else "\n\n") if parts else "", text
            last = kind
        return "".join(parts)

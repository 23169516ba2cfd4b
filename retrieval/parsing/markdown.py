"""What of Markdown matters to retrieval: its lines, its headings. Not a full parser, but linear in time.

Follows CommonMark 0.31 for ATX and setext headings and fenced code, with two simplifications: a setext heading has
one line, and containers (a heading in a list or a quotation) are not looked into.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

# A run of blank lines, or one line.
LINE = re.compile(r"(?:[ \t]*+(?:\r\n|[\r\n]))++|[^\r\n]*(?:\r\n|[\r\n]|\Z)")
ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+|$)")
UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
BREAK = re.compile(r" {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(?=([^\r\n]*))")
ITEM = re.compile(r"[ \t]*(?:[-*+•◦▪‣]|\(?(?:\d{1,3}|[a-z])\)|\d{1,3}\.)[ \t]+(?=\S)")
FRONT_MATTER = re.compile(r"---[ \t]*\r?\n[\w-]+[ \t]*:.*?\n---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
FRONT_MATTER_CHARACTERS = 8192
ROW = re.compile(r"[ \t]*\|")
LINK = re.compile(r"!?\[([^\[\]]{0,500})\]\([^()\s]{0,2000}\)")


class Kind(Enum):
    BLANK = auto()
    HEADING = auto()
    UNDERLINE = auto()  # of a setext heading: the line before is its text
    BREAK = auto()
    CODE = auto()  # a line of a fenced block, fences included
    ITEM = auto()  # the first line of a list item
    ROW = auto()  # of a table
    TEXT = auto()


@dataclass(frozen=True, slots=True)
class Line:
    """Characters [start, end) of the text, its line ending left out. `level`: of a heading or underline, from 1."""

    kind: Kind
    start: int
    end: int
    level: int = 0


@dataclass(frozen=True, slots=True)
class Heading:
    """`start`: the character at which its line begins; `level` from 1 to 6; `title` without markup."""

    start: int
    level: int
    title: str


def lines(text: str) -> Iterator[Line]:
    """Every line of a text; blank lines in a row count as one, front matter between two lines of `---` as code."""
    fence, before = "", Kind.BLANK
    for match in LINE.finditer(text):
        if match.start() == match.end():  # only at the end of the text
            return
        content = match[0].rstrip("\r\n")
        if match.start() == 0 and FRONT_MATTER.match(text[:FRONT_MATTER_CHARACTERS]):
            fence, kind, level = "---", Kind.CODE, 0
        elif fence:
            kind, level = Kind.CODE, 0
            if _closes(content, fence):
                fence = ""
        elif opening := _opens(content):
            fence, kind, level = opening, Kind.CODE, 0
        else:
            kind, level = _kind(content, before)
        yield Line(kind, match.start(), match.start() + len(content), level)
        before = kind


def headings(text: str) -> Iterator[Heading]:
    """In order of appearance."""
    last = Line(Kind.BLANK, 0, 0)
    for line in lines(text):
        if line.kind is Kind.HEADING:
            title = ATX.sub("", text[line.start : line.end], count=1).rstrip()
            bare = title.rstrip("#")
            yield Heading(line.start, line.level, plain(bare if bare[-1:].isspace() or not bare else title))
        elif line.kind is Kind.UNDERLINE:
            yield Heading(last.start, line.level, plain(text[last.start : last.end]))
        last = line


def first_heading(text: str) -> str:
    """Its title; empty: there is none."""
    first = next(headings(text), None)
    return first.title if first is not None else ""


def plain(line: str) -> str:
    """One line without links and emphasis, its spaces collapsed."""
    return " ".join(LINK.sub(r"\1", line).replace("`", "").replace("*", "").split())


def _opens(content: str) -> str:
    """The fence that a line opens, or nothing. Backticks after backticks: inline code."""
    match = FENCE.match(content)
    return match[1] if match and not (match[1][0] == "`" and "`" in match[2]) else ""


def _closes(content: str, fence: str) -> bool:
    content = content.strip()
    if fence == "---":
        return content == fence
    return len(content) >= len(fence) and not content.strip(fence[0])


def _kind(content: str, before: Kind) -> tuple[Kind, int]:
    if not content or content.isspace():
        return Kind.BLANK, 0
    if atx := ATX.match(content):
        return Kind.HEADING, len(atx[1])
    if before is Kind.TEXT and (underline := UNDERLINE.match(content)):
        return Kind.UNDERLINE, 1 if underline[1][0] == "=" else 2
    if BREAK.match(content):
        return Kind.BREAK, 0
    if ITEM.match(content):
        return Kind.ITEM, 0
    return (Kind.ROW if ROW.match(content) else Kind.TEXT), 0

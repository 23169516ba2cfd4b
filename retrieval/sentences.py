"""Text cut into sentences: for answers that quote, and for overlaps that begin where a sentence does.

Rules, not a model: a sentence ends at a full stop, question or exclamation mark, or their CJK, Arabic and Devanagari
kin, unless what stands before is an abbreviation or what follows goes on in lower case. Lines that Markdown sets
apart are units: headings, list items, rows of tables, lines of code. In doubt two sentences stay one, since an
answer may be too long but must not break off.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from millrace.retrieval.parsing import markdown
from millrace.retrieval.parsing.markdown import Kind

MAX_BYTES = 1000  # of a sentence; a longer one is cut at a clause, a space, or at last anywhere
LOOK_BACK = 24  # characters before a full stop in which an abbreviation is looked for

END = re.compile(r"(?P<wide>[。！？｡]+)|[.!?…؟۔।]+")
CLOSING = re.compile(r"""["'”’“‘»›«‹)\]}」』）】〉》*_]*(?:\[\d{1,3}\])*""")
NEXT = re.compile(r"""\s+(?![.!?…])["'“‘«‹„(\[{¿¡*_]*(\w{0,20})""")
SPACE = re.compile(r"\s+")
DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # u.s, a.m, z.b
CLAUSES = ("; ", ": ", ", ", " — ", " – ", "；", "：", "，", "、", "، ")
WORDS = (" ", "\n", "\t")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name, a word or an example follows: never the end.
LEADING = _words(
    "mr mrs ms mx dr prof messrs gen adm col maj capt cpt lt sgt cmdr rep sen gov rev hon pres supt mt"
    " e.g eg i.e cf vs v viz ca approx incl resp esp bzw ggf z.b d.h u.a hr fr dipl"
)
# The end, unless a number or a single letter follows; "no" is also a word, so only a number counts there.
NUMBERED = _words("no nos nr fig figs eq eqs p pp vol vols ch sec sect art par para app ref refs tab op ver")
# In the middle or at the end, as are DATES: the end if a word follows that rarely is a name.
TRAILING = _words(
    "etc al inc ltd co corp llc bros jr sr esq ph.d dept univ assn est min max hrs mins tel ext st ave blvd rd sq ft"
)
DATES = _words("Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thur Thurs Fri Sat Sun")
STARTERS = _words(
    "The A An In On At It Its He She They We You I This That These Those There Here If When While Where What Which"
    " Who Why How But And Or So Then However For From To By With Without As After Before Since During Our Your His Her"
    " Their My Not No Yes Please All Any Some Many Most More Each Every Both Also Although Though Because Once Until"
    " Unless Under Over Is Are Was Were Do Does Did Can Could Will Would Should May Might Must Only Otherwise Therefore"
    " Thus Instead Meanwhile Nevertheless Moreover Furthermore Later Today Now One Two Der Die Das Ein Eine Es Wir Sie"
    " Ich Er Und Aber"
)


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int
    is_heading: bool


@dataclass(frozen=True, slots=True)
class Sentence:
    """Bytes [byte_start, byte_end) of the text's UTF-8, without white space at either end."""

    text: str
    byte_start: int
    byte_end: int
    is_heading: bool = False


def sentences(text: str) -> list[Sentence]:
    """In order, without overlap; together they are all of the text but white space. At most MAX_BYTES each."""
    found: list[Sentence] = []
    characters = position = 0  # how far the text is counted, in both units
    for start, end, is_heading in spans(text):
        position += len(text[characters:start].encode())
        length = len(text[start:end].encode())
        found.append(Sentence(text[start:end], position, position + length, is_heading))
        characters, position = end, position + length
    return found


def spans(text: str) -> Iterator[Span]:
    """The same in characters."""
    for block_start, block_end, kind in _blocks(text):
        is_heading = kind is Kind.HEADING
        ends = _ends(text, block_start, block_end) if kind in (Kind.TEXT, Kind.ITEM) else iter(())
        start = block_start
        for end in (*ends, block_end):
            for first, last in _fitting(text, *_trimmed(text, start, end)):
                yield Span(first, last, is_heading)
            start = end


def _blocks(text: str) -> Iterator[tuple[int, int, Kind]]:
    """Runs of lines that may share a sentence: paragraphs, list items; any other line stands alone."""
    start, end, kind, count = 0, 0, Kind.BLANK, 0  # of the open block
    for line in markdown.lines(text):
        if line.kind is Kind.UNDERLINE and kind is Kind.TEXT and count == 1:
            kind, end = Kind.HEADING, line.end
        elif line.kind is Kind.TEXT and kind in (Kind.TEXT, Kind.ITEM):
            end, count = line.end, count + 1
        else:
            yield start, end, kind
            start, end, kind, count = line.start, line.end, line.kind, 1
    yield start, end, kind


def _ends(text: str, start: int, end: int) -> Iterator[int]:
    """Where a sentence of the block ends, the end of the block left out."""
    for stop in END.finditer(text, start, end):
        closing = CLOSING.match(text, stop.end(), end)
        after = closing.end() if closing else stop.end()
        if after >= end:
            return
        if stop["wide"]:
            quoted = after > stop.end() and "ぁ" <= text[after] <= "ん"  # 「…。」と言った: the sentence goes on
            if not quoted:
                yield after
        elif (following := NEXT.match(text, after, end)) and _is_end(text, start, stop, following[1]):
            yield after


def _is_end(text: str, block: int, stop: re.Match[str], following: str) -> bool:
    """Whether marks that the word `following` comes after end a sentence of the block that begins at `block`."""
    if following[:1].islower() and following == following.lower():  # not iPhone
        return False
    return stop[0] != "." or not _abbreviates(text, block, stop.start(), following)


def _abbreviates(text: str, block: int, position: int, following: str) -> bool:
    """Whether the dot at `position` belongs to an abbreviation or a number and ends no sentence."""
    before = text[max(block, position - LOOK_BACK) : position].split()
    word = before[-1].lstrip("\"'“‘«„([{*_") if before and not text[position - 1].isspace() else ""
    lower = word.lower()
    if lower in LEADING:
        return True
    if lower in NUMBERED:
        return following[:1].isdigit() or (len(following) == 1 and lower != "no")
    if word.isdigit() and len(word) <= 3 and len(before) == 1 and position <= block + 4:  # the number of a list item
        return True
    if lower in TRAILING or word in DATES or DOTTED.fullmatch(lower) or (len(word) == 1 and word.isupper()):
        return following not in STARTERS
    return False


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    bare = piece.lstrip()
    start += len(piece) - len(bare)
    return start, start + len(bare.rstrip())


def _fitting(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A piece without outer white space, cut so that no part exceeds MAX_BYTES."""
    while start < end:
        window = text[start : min(end, start + MAX_BYTES)].encode()[:MAX_BYTES].decode(errors="ignore")
        cut = start + len(window)
        if cut < end:
            cut = _clause_or_word(window, start) or whole_characters(text, start, cut)
        yield _trimmed(text, start, cut)
        space = SPACE.match(text, cut, end)
        start = space.end() if space else cut


def _clause_or_word(window: str, start: int) -> int:
    """Where to cut a window of the text that begins at `start`; 0: nowhere in its second half."""
    for marks in (CLAUSES, WORDS):
        if (at := max(window.rfind(mark) + len(mark) for mark in marks)) > len(window) // 2:
            return start + at
    return 0


def whole_characters(text: str, start: int, cut: int) -> int:
    """The nearest place in (start, cut] that does not part a character from its marks, at most 32 before `cut`."""
    for place in range(cut, max(cut - 32, start), -1):
        if place == len(text) or not (_joins(text[place]) or text[place - 1] == "\u200d"):
            return place
    return cut


def _joins(character: str) -> bool:
    """Combining marks, variation selectors, the zero-width joiner, skin tones."""
    return (
        character == "\u200d"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
        or unicodedata.category(character) in ("Mn", "Mc", "Me")
    )

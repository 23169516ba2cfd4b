"""Groups of digits in folded text, as people write long numbers: what cards, SSNs and phone numbers have in common."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from millrace.server.gateway.guardrails.folding import CASED, LONG_DASH, pattern

MAX_NUMBER = 70  # characters; the longest telephone number with the widest separators has fewer
MIN_DIGITS = 8  # of the shortest number
MAX_GROUPS = 6  # that a rule reads: a card in the smallest groups
SEPARATOR = rb"(?: ?[-\x96/] ?| {1,2}|\.)"
DASHES = b"-" + LONG_DASH

LETTERS = b"abcdefghijklmnopqrstuvwxyz" + CASED
_DIGITS = b"0123456789"
_SEPARATORS = {sign: sign for sign in (b" ", b"  ", b".")} | {
    before + sign + behind: b"/" if sign == b"/" else b"-"
    for sign in (b"-", LONG_DASH, b"/")
    for before in (b"", b" ")
    for behind in (b"", b" ")
}
_NOT_FIRST = b" ./)" + DASHES
_CHARACTERS = _DIGITS + b"+(" + _NOT_FIRST
_BLANKS = bytes(byte if byte in _DIGITS else ord(" ") for byte in range(256))

# The least that a number of some kind looks like; the rules read on from there.
_GAP = rb"[ ./()\-\x96]{0,5}"
_LEAST = (
    rb"\(?\+\(?[1-9](?:" + _GAP + rb"[0-9]){7}",
    rb"00" + SEPARATOR + rb"?[1-9](?:" + _GAP + rb"[0-9]){6}",
    rb"(?:1" + SEPARATOR + rb"?)?\([2-9][0-9]{2}\)" + SEPARATOR + rb"?[2-9][0-9]{2}" + SEPARATOR + rb"[0-9]{4}",
    rb"(?:1" + SEPARATOR + rb")?[2-9][0-9]{2}" + SEPARATOR + rb"[2-9][0-9]{2}" + SEPARATOR + rb"[0-9]{4}",
    rb"[0-8][0-9]{2}" + SEPARATOR + rb"[0-9]{2}" + SEPARATOR + rb"[0-9]{4}",
    rb"[2-68][0-9]{3,7}" + SEPARATOR + rb"[0-9]{3,8}" + SEPARATOR + rb"[0-9]{3}",
    rb"[2-68][0-9]{4,7}" + SEPARATOR + rb"[0-9]{5}",
    rb"[0-9]{9}",
)
_PLACE = pattern(b"|".join(_LEAST))
_DIGIT_RUN = pattern(rb"[0-9]+")


class Group(NamedTuple):
    """Digits that end before `end`; `separator`: "-", "/", "." or one or two spaces before them, if any."""

    digits: bytes
    separator: bytes
    end: int


class Place(NamedTuple):
    """Where a number may begin: at `view`, which reads on to MAX_NUMBER + 1 characters or the end; behind `left`."""

    left: bytes
    view: bytes
    groups: list[Group]  # that begin `view`, MAX_GROUPS at most

    def detached(self, glue: bytes = b"") -> bool:
        """Whether this is no place within a word or a decimal, nor behind a digit and one of `glue`."""
        last, digit = self.left[-1:], self.left[-2:-1].isdigit()
        return not (last and last in LETTERS + _DIGITS) and not (digit and last and last in b"." + glue)


def place(left: bytes, view: bytes) -> Place:
    return Place(left, view, list(islice(groups(view), MAX_GROUPS)))


def groups(view: bytes) -> Iterator[Group]:
    """The groups that begin `view`, one separator between two."""
    run = view[: len(view) - len(view.lstrip(_DIGITS + b" ./" + DASHES))]
    end = 0
    for digits in run.translate(_BLANKS).split():
        start = run.index(digits, end)
        separator = _SEPARATORS.get(run[end:start]) if end else b"" if start == 0 else None
        if separator is None:
            return
        end = start + len(digits)
        yield Group(digits, separator, end)


def some(data: bytes) -> bool:
    """Whether there are digits enough for a number."""
    return len(data) - len(data.translate(None, _DIGITS)) >= MIN_DIGITS


def find(data: bytes, start: int) -> int:
    """Index of the next character from `start` on that may begin a number; len(data): there is none."""
    match = _PLACE.search(data, start)
    return match.start() if match else len(data)


def after(data: bytes, index: int) -> int:
    """Where to look on when no number begins at `index`: no number begins within a group of digits."""
    near = data[index : index + MAX_NUMBER]
    rest = near.lstrip(_DIGITS)
    if rest:
        return index + max(len(near) - len(rest), 1)
    match = _DIGIT_RUN.match(data, index)
    return match.end() if match else index + 1


def unsettled(data: bytes) -> int:
    """Index of the first character from which on a number may go on behind the end of `data`."""
    run = max(len(data.rstrip(_CHARACTERS)), len(data) - MAX_NUMBER)
    return len(data) - len(data[run:].lstrip(_NOT_FIRST))

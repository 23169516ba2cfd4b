"""Groups of digits in folded text, as people write long numbers: what cards, SSNs and phone numbers have in common."""

from collections.abc import Iterator
from typing import NamedTuple

from millrace.server.gateway.guardrails.folding import CASED, LONG_DASH, pattern

MAX_NUMBER = 70  # characters; the longest telephone number with the widest separators has fewer
SEPARATOR = rb"(?: ?[-\x96/] ?| {1,2}|\.)"

LETTERS = b"abcdefghijklmnopqrstuvwxyz" + CASED
_DIGITS = b"0123456789"
_DASHES = b"-" + LONG_DASH
_NOT_FIRST = b" ./)" + _DASHES
_CHARACTERS = _DIGITS + b"+(" + _NOT_FIRST
_BLANKS = bytes(byte if byte in _DIGITS else ord(" ") for byte in range(256))


# The least that a number of some kind looks like; the rules read on from there.
_GAP = rb"[ ./()\-\x96]{0,3}"
_PLACE = pattern(
    b"|".join(
        (
            rb"\(?\+\(?[1-9](?:" + _GAP + rb"[0-9]){7}",
            rb"00" + SEPARATOR + rb"?[1-9](?:" + _GAP + rb"[0-9]){6}",
            rb"\([0-9]{3}\)" + SEPARATOR + rb"?[0-9]{3}" + SEPARATOR + rb"[0-9]{4}",
            rb"[0-9]{3}" + SEPARATOR + rb"[0-9]{2,3}" + SEPARATOR + rb"[0-9]{4}",
            rb"1" + SEPARATOR + rb"?\(?[0-9]{3}\)?" + SEPARATOR + rb"?[0-9]{3}" + SEPARATOR + rb"[0-9]{4}",
            rb"[0-9]{4,8}" + SEPARATOR + rb"[0-9]{3}",
            rb"[0-9]{9}",
        )
    )
)
_GROUPS = pattern(rb"[0-9]+(?:" + SEPARATOR + rb"[0-9]+)*")
_DIGIT_RUN = pattern(rb"[0-9]+")


class Group(NamedTuple):
    """Digits that end before `end`; `separator`: what stands before them, without its spaces unless it is one."""

    digits: bytes
    separator: bytes
    end: int


def groups(view: bytes) -> Iterator[Group]:
    """The groups that begin `view`."""
    match = _GROUPS.match(view)
    run, end = match.group() if match else b"", 0
    for digits in run.translate(_BLANKS).split():
        start = run.index(digits, end)
        separator = run[end:start].strip() or run[end:start][:1]
        end = start + len(digits)
        yield Group(digits, b"-" if separator == LONG_DASH else separator, end)


def place(data: bytes, start: int) -> int:
    """Index of the next character from `start` on that may begin a number; len(data): there is none."""
    match = _PLACE.search(data, start)
    return match.start() if match else len(data)


def after(data: bytes, index: int) -> int:
    """Where to look on when no number begins at `index`: no number begins within a group of digits."""
    match = _DIGIT_RUN.match(data, index)
    return match.end() if match else index + 1


def detached(left: bytes, glue: bytes = b"") -> bool:
    """Whether a number may begin behind `left`: not in a word or a decimal, nor behind a digit and one of `glue`."""
    last, digit = left[-1:], left[-2:-1].isdigit()
    return not (last and last in LETTERS + _DIGITS) and not (digit and last and last in b"." + glue)


def unsettled(data: bytes) -> int:
    """Index of the first character from which on a number may go on behind the end of `data`."""
    run = max(len(data.rstrip(_CHARACTERS)), len(data) - MAX_NUMBER)
    return len(data) - len(data[run:].lstrip(_NOT_FIRST))

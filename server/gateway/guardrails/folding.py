"""Text as the rules of a guard read it: one byte for each visible character, whatever it was written with.

Full-width and mathematical letters and digits become plain ones, digits of all scripts 0 to 9, every space a
space, hyphens "-", letters lower case. What is not visible (zero-width characters, soft hyphens, combining marks)
is left out: somebody who reads the text does not see it either.
"""

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import re2

CASED = b"\xe0"  # a letter beyond ASCII, of a script with upper and lower case
UNCASED = b"\xe1"  # a letter of any other script; most of these write words without spaces between
LONG_DASH = b"\x96"  # joins digits as a hyphen does, and parts words
OTHER = b"\x00"
_INVISIBLE = b"\xad"

_HYPHENS = "\u2010\u2011\u2212\ufe63\uff0d"  # hyphens and minus signs
_FILLERS = "\u115f\u1160\u3164\uffa0\u2800\u034f"  # letters and a sign that show nothing
_LOWER = bytes(range(256)).lower()
_BASIC = 0xFFFF  # the last character of Unicode's first plane, all of which may be remembered


_OPTIONS = re2.Options()
_OPTIONS.encoding, _OPTIONS.log_errors = re2.Options.Encoding.LATIN1, False


def pattern(text: bytes) -> Any:
    """A regular expression over folded text: matched in linear time, without look-around."""
    return re2.compile(text, _OPTIONS)


class Folded(NamedTuple):
    """`origins[i]`: where in the text the character of `data[i]` stands; one more: the length of the text."""

    data: bytes
    origins: Sequence[int]

    def reach(self, start: int, characters: int) -> int:
        """The end of what the next `characters` of the text after data[start] hold, as an index of data."""
        return min(bisect_left(self.origins, self.origins[start] + characters, start), len(self.data))


class _Table(dict[int, int]):
    """For str.translate: filled as characters turn up."""

    def __missing__(self, code: int) -> int:
        folded = _fold(chr(code))[0]
        if code <= _BASIC:
            self[code] = folded
        return folded


_TABLE = _Table()


def fold(text: str) -> Folded:
    if text.isascii():
        return Folded(text.encode().translate(_LOWER), range(len(text) + 1))
    data = text.translate(_TABLE).encode("latin-1")
    if _INVISIBLE not in data:
        return Folded(data, range(len(text) + 1))
    origins = [i for i, byte in enumerate(data) if byte != _INVISIBLE[0]]
    return Folded(data.translate(None, _INVISIBLE), [*origins, len(text)])


def _fold(character: str) -> bytes:
    """One byte of latin-1."""
    category = unicodedata.category(character)
    if character.isascii():
        return character.lower().encode()
    if category in {"Cf", "Mn", "Me"} or character in _FILLERS:
        return _INVISIBLE
    if category == "Nd":
        return b"%d" % unicodedata.decimal(character)
    if category == "Zs":
        return b" "
    if category == "Pd" or character in _HYPHENS:
        return b"-" if character in _HYPHENS else LONG_DASH
    plain = unicodedata.normalize("NFKC", character)
    # Not digits: a superscript behind a number is a footnote's, no digit of the number.
    if len(plain) == 1 and plain.isascii() and not plain.isdigit():
        return plain.lower().encode()
    if category[0] == "L" or category == "Mc":
        return CASED if character.lower() != character.upper() else UNCASED
    return OTHER

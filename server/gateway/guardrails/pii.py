"""Personal data in a text or a stream: found, and masked before it goes out.

What begins at a character is decided by the text before it, as sent, and by the next HOLD_BACK characters; nothing
else. So the result cannot depend on how a text is cut: the stream keeps every character that this much text has not
decided yet, and a text as a whole is read by the same function.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from millrace.server.gateway.guardrails import emails, numbers
from millrace.server.gateway.guardrails.base import Finding
from millrace.server.gateway.guardrails.cards import card
from millrace.server.gateway.guardrails.folding import fold
from millrace.server.gateway.guardrails.phones import phone
from millrace.server.gateway.guardrails.ssns import ssn
from millrace.server.text.holdback import Piece

HOLD_BACK = 512  # characters; more than any match has, unless hundreds of invisible ones are in it
CONTEXT = emails.MAX_LOCAL + 1  # characters before a match that its rules look at
# Of matches at one place the longest counts, of equally long ones the first in this order.
MASKS = {"card": "[CARD]", "ssn": "[SSN]", "phone": "[PHONE]", "email": "[EMAIL]"}
_FOLDED_MASKS = {category: mask.lower().encode() for category, mask in MASKS.items()}


class PIIGuard:
    """E-mail addresses, telephone numbers, United States social security numbers, payment cards."""

    def inspect(self, text: str) -> list[Finding]:
        return _Reader(b"", text, last=True).read()

    def cover(self, text: str, findings: Sequence[Finding]) -> str:
        return "".join(piece.text for piece in _pieces(text, findings, len(text)))

    def mask(self, text: str) -> str:
        return self.cover(text, self.inspect(text))

    def stream(self) -> "MaskStage":
        return MaskStage()


class MaskStage:
    """A hold-back stage that masks. At most HOLD_BACK - 1 characters are held."""

    def __init__(self) -> None:
        self._before = b""
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        return self._read(self._held + text, last=False)

    def finish(self) -> list[Piece]:
        return self._read(self._held, last=True)

    def _read(self, text: str, last: bool) -> list[Piece]:
        reader = _Reader(self._before, text, last)
        findings = reader.read()
        cut = reader.decided
        self._before, self._held = reader.before, text[cut:]
        return _pieces(text, findings, cut)


def _pieces(text: str, findings: Sequence[Finding], end: int) -> list[Piece]:
    pieces, position = [], 0
    for finding in findings:
        mask = MASKS[finding.category]
        pieces.append(Piece(text[position : finding.start], finding.start - position))
        # In two, since a piece as long as its source would stand for it character by character.
        pieces += [Piece(mask[:-1], 0), Piece(mask[-1], finding.end - finding.start)]
        position = finding.end
    pieces.append(Piece(text[position:end], end - position))
    return [piece for piece in pieces if piece.source or piece.text]


class _Match(NamedTuple):
    """As a Finding, in folded text."""

    category: str
    start: int
    end: int


class _Reader:
    """One pass from left to right. `before`: the folded text before `text`, as sent; after read(), before `decided`.

    `last`: nothing follows the text. Otherwise only what begins in its decided part is found. Places are where a
    regular expression sees the beginning of a match; the rules have the last word.
    """

    def __init__(self, before: bytes, text: str, last: bool):
        self.before = before
        self.decided = 0
        self._folded = fold(text)
        self._data = self._folded.data
        self._open = len(self._data) if last else self._first_open(len(text))
        self._position = 0
        self._at = emails.find(self._data, 0)
        self._number = numbers.find(self._data, 0) if numbers.some(self._data) else len(self._data)

    def read(self) -> list[Finding]:
        found, origins = [], self._folded.origins
        while (match := self._next()) is not None:
            found.append(Finding(match.category, origins[match.start], origins[match.end - 1] + 1))
            self._go_on(match.end, (self._left(match.start) + _FOLDED_MASKS[match.category])[-CONTEXT:])
        end = max(self._open, self._position)
        self.before, self.decided = self._left(end), origins[end]
        return found

    def _first_open(self, length: int) -> int:
        """Index of the first character that what follows the text has a say in."""
        undecided = min(emails.unsettled(self._data), numbers.unsettled(self._data))
        return max(undecided, bisect_left(self._folded.origins, length - HOLD_BACK + 1))

    def _go_on(self, position: int, before: bytes) -> None:
        self._position, self.before = position, before
        if self._at < position:
            self._at = emails.find(self._data, position)
        if self._number < position:
            self._number = numbers.find(self._data, position)

    def _next(self) -> _Match | None:
        """The leftmost match in the decided part, of those that begin there the longest."""
        while min(self._number, self._at) < len(self._data):
            if min(self._number, self._at - emails.MAX_LOCAL) >= self._open:
                return None
            matches = self._matches()
            if matches:
                first = min(matches, key=lambda match: (match.start, -match.end))
                return first if first.start < self._open else None
        return None

    def _matches(self) -> list[_Match]:
        """Matches at the next place that begin no later than there; none: it is passed."""
        number, at = self._number, self._at
        email = self._email_around(at) if at - number <= emails.MAX_LOCAL else None
        if at < number:
            self._at = at if email else emails.find(self._data, at + 1)
            return [email] if email else []
        matches = [self._number_from(number), email if email and email.start <= number else None]
        found = [match for match in matches if match]
        if not found:
            self._number = numbers.find(self._data, numbers.after(self._data, number))
        return found

    def _left(self, index: int) -> bytes:
        """The CONTEXT characters before data[index], masks in place."""
        near = self._data[max(self._position, index - CONTEXT) : index]
        return near if len(near) == CONTEXT else (self.before + near)[-CONTEXT:]

    def _number_from(self, start: int) -> _Match | None:
        end = min(self._folded.reach(start, HOLD_BACK), start + numbers.MAX_NUMBER + 1)
        place = numbers.place(self._left(start), self._data[start:end])
        lengths = {"card": card(place), "ssn": ssn(place), "phone": phone(place)}
        category = max(lengths, key=lengths.__getitem__)
        return _Match(category, start, start + lengths[category]) if lengths[category] else None

    def _email_around(self, at: int) -> _Match | None:
        start = at - emails.local_length(self._left(at))
        if not self._position <= start < at < len(self._data):
            return None
        end = self._folded.reach(start, HOLD_BACK)
        length = emails.domain_length(self._data[at + 1 : min(end, at + 2 + emails.MAX_DOMAIN)])
        return _Match("email", start, at + 1 + length) if length else None

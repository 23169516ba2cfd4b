"""Payment card numbers: 13 to 19 digits, an issuer's first digits, a valid check digit (ISO/IEC 7812)."""

from millrace.server.gateway.guardrails.numbers import LETTERS, Place

SIXTEEN, TO_NINETEEN = (16,), (16, 17, 18, 19)
# First digits, from and to, and the lengths that the issuer uses.
ISSUERS = (
    (b"4", b"4", (13, 16, 19)),  # Visa
    (b"51", b"55", SIXTEEN),  # Mastercard
    (b"2221", b"2720", SIXTEEN),
    (b"34", b"34", (15,)),  # American Express
    (b"37", b"37", (15,)),
    (b"6011", b"6011", TO_NINETEEN),  # Discover
    (b"644", b"659", TO_NINETEEN),
    (b"300", b"305", (14, *TO_NINETEEN)),  # Diners Club
    (b"3095", b"3095", (14, *TO_NINETEEN)),
    (b"36", b"36", (14, *TO_NINETEEN)),
    (b"38", b"39", (14, *TO_NINETEEN)),
    (b"3528", b"3589", TO_NINETEEN),  # JCB
    (b"62", b"62", TO_NINETEEN),  # UnionPay
    (b"81", b"82", TO_NINETEEN),  # UnionPay and RuPay
    (b"60", b"60", SIXTEEN),  # RuPay
    (b"2200", b"2204", TO_NINETEEN),  # Mir
    (b"5018", b"5018", (13, 14, 15, *TO_NINETEEN)),  # Maestro
    (b"5020", b"5020", (13, 14, 15, *TO_NINETEEN)),
    (b"5038", b"5038", (13, 14, 15, *TO_NINETEEN)),
    (b"5893", b"5893", (13, 14, 15, *TO_NINETEEN)),
    (b"6304", b"6304", (13, 14, 15, *TO_NINETEEN)),
    (b"6759", b"6763", (13, 14, 15, *TO_NINETEEN)),
    (b"50", b"50", (16, 19)),
    (b"56", b"58", (16, 19)),
    (b"63", b"63", (16, 19)),
    (b"67", b"67", (16, 19)),
)
MIN_DIGITS, MAX_DIGITS = 13, 19
EAN = 13  # digits of a bar code

_VALUE = bytes(byte % 16 for byte in range(256))
_DOUBLED = bytes(2 * (byte % 16) // 10 + 2 * (byte % 16) % 10 for byte in range(256))


def card(place: Place) -> int:
    """Length of the longest card number that begins here; 0: there is none.

    Its digits stand together, or in groups of 3 to 8 of which the first has 4 or more.
    """
    if not place.detached():
        return 0
    digits, longest = b"", 0
    for number, group in enumerate(place.groups):
        size, together = len(group.digits), number == 0 and len(group.digits) > 8
        if group.separator == b"/" or not (together or (3 if number else 4) <= size <= 8):
            break
        digits += group.digits
        if is_card(digits) and not (group.end < len(place.view) and place.view[group.end] in LETTERS):
            longest = group.end
        if together or len(digits) >= MAX_DIGITS:
            break
    return longest


def is_card(digits: bytes) -> bool:
    if not MIN_DIGITS <= len(digits) <= MAX_DIGITS or not luhn(digits) or (len(digits) == EAN and _is_ean(digits)):
        return False
    return any(low <= digits[: len(low)] <= high and len(digits) in lengths for low, high, lengths in ISSUERS)


def luhn(digits: bytes) -> bool:
    """From the right, every second digit doubled, the digits of all that summed: a multiple of ten."""
    return (sum(digits[::-2].translate(_VALUE)) + sum(digits[-2::-2].translate(_DOUBLED))) % 10 == 0


def _is_ean(digits: bytes) -> bool:
    """A product's bar code: one in ten passes for a card, while cards of 13 digits are hardly issued any more."""
    return (sum(digits[::-2].translate(_VALUE)) + 3 * sum(digits[-2::-2].translate(_VALUE))) % 10 == 0

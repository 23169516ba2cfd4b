"""Telephone numbers: international ones behind + or 00 (ITU-T E.164), North American ones with separators."""

from millrace.server.gateway.guardrails.folding import pattern
from millrace.server.gateway.guardrails.numbers import DASHES, SEPARATOR, Place, groups

MAX_DIGITS = 15
COLUMNS = b"  "  # two spaces part the columns of a table
# How many digits follow the country code, least and most, where the plan is narrower than E.164.
PLANS = {
    b"1": (10, 10), b"7": (10, 10), b"20": (8, 10), b"27": (9, 9), b"30": (10, 10), b"31": (9, 9), b"32": (8, 9),
    b"33": (9, 9), b"34": (9, 9), b"36": (8, 9), b"39": (8, 11), b"40": (9, 9), b"41": (9, 9), b"44": (9, 10),
    b"45": (8, 8), b"46": (7, 10), b"47": (8, 8), b"48": (9, 9), b"51": (8, 9), b"52": (10, 10), b"54": (10, 11),
    b"55": (10, 11), b"56": (9, 9), b"57": (10, 10), b"58": (10, 10), b"60": (8, 10), b"61": (9, 9), b"62": (8, 12),
    b"63": (8, 10), b"64": (8, 10), b"65": (8, 8), b"66": (8, 9), b"81": (9, 10), b"82": (8, 10), b"84": (9, 10),
    b"86": (10, 11), b"90": (10, 10), b"91": (10, 10), b"92": (9, 10), b"98": (10, 10), b"212": (9, 9),
    b"234": (8, 10), b"254": (9, 9), b"351": (9, 9), b"353": (7, 9), b"380": (9, 9), b"420": (9, 9), b"421": (9, 9),
    b"852": (8, 8), b"886": (8, 9), b"966": (9, 9), b"971": (8, 9), b"972": (8, 9),
}  # fmt: skip
ANY_PLAN = (7, 12)
TWO_DIGITS = frozenset(b"43 49 53 93 94 95".split()) | {code for code in PLANS if len(code) == 2}
# Of three digits: every code that begins so and is not one of two.
THREE_DIGITS = (b"21", b"22", b"23", b"24", b"25", b"26", b"29", b"35", b"37", b"38", b"42", b"50", b"59", b"67",
                b"68", b"69", b"85", b"87", b"88", b"96", b"97", b"99")  # fmt: skip

_CODE = pattern(rb"\(\+([1-9][0-9]{0,2})\)" + SEPARATOR + rb"?|\+|00" + SEPARATOR + rb"?")
_AREA = pattern(rb"([0-9]{0,3}) ?\(([0-9]{1,5})\)" + SEPARATOR + rb"?")
_NORTH_AMERICAN = pattern(
    rb"(?:1" + SEPARATOR + rb"?)?\(([2-9][0-9]{2})\)" + SEPARATOR + rb"?([2-9][0-9]{2})" + SEPARATOR + rb"[0-9]{4}"
)


def phone(place: Place) -> int:
    """Length of the longest telephone number that begins here; 0: there is none."""
    if place.view[:1] in (b"+", b"("):
        if place.left[-1:].isdigit() or (place.left[-1:] == b"e" and place.left[-2:-1].isdigit()):
            return 0  # a sum or an exponent
    # "00 …" behind digits and a space is a group of a longer number, an IBAN's for one.
    elif not place.detached(glue=DASHES + (b" " if place.view.startswith(b"00") else b"")):
        return 0
    return max(_international(place.view), _north_american(place))


def _international(view: bytes) -> int:
    opening = _CODE.match(view)
    if opening is None:
        return 0
    code, zeros = opening.group(1) or b"", view.startswith(b"00")
    area = _AREA.match(view, opening.end())
    start, digits = opening.end(), code
    if area is not None and (code == b"" or area.group(1) == b""):
        start = area.end()
        digits += area.group(1) + (area.group(2) if area.group(2) != b"0" else b"")
    longest, separators = 0, set()
    for group in groups(view[start:]):
        separators.add(group.separator)
        digits += group.digits
        if len(digits) > MAX_DIGITS or group.separator == COLUMNS:
            break
        dotted = b"." in separators and len(separators - {b""}) > 1
        spelled = not zeros or area is not None or len(separators) > 1 or len(opening.group()) > 2
        if _is_number(digits) and not dotted and spelled:
            longest = start + group.end
    return longest


def _is_number(digits: bytes) -> bool:
    """Whether these are a country code and as many digits as its plan has."""
    length = next((n for n in (1, 2, 3) if _is_code(digits[:n])), 0)
    code, national = digits[:length], digits[length:]
    least, most = PLANS.get(code, ANY_PLAN)
    if code == b"1" and not _is_exchange(national[:3], national[3:6]):
        return False
    return bool(code) and least <= len(national) <= most


def _is_code(digits: bytes) -> bool:
    return digits in (b"1", b"7") or digits in TWO_DIGITS or (len(digits) == 3 and digits[:2] in THREE_DIGITS)


def _is_exchange(area: bytes, exchange: bytes) -> bool:
    """Neither begins with 0 or 1, neither is a service code such as 911."""
    return all(b"200" <= part <= b"999" and part[1:] != b"11" for part in (area, exchange))


def _north_american(place: Place) -> int:
    view, parts = place.view, place.groups[:4]
    if b"(" in view[:6]:
        match = _NORTH_AMERICAN.match(view)
        if match is None or view[match.end() : match.end() + 1].isdigit():
            return 0
        return match.end() if _is_exchange(match.group(1), match.group(2)) else 0
    if parts and parts[0].digits == b"1":
        parts = parts[1:]
    if [len(part.digits) for part in parts[:3]] != [3, 3, 4] or COLUMNS in {part.separator for part in parts[:3]}:
        return 0
    return parts[2].end if _is_exchange(parts[0].digits, parts[1].digits) else 0

"""United States social security numbers: 3, 2 and 4 digits, or 9 together where they are named."""

from millrace.server.gateway.guardrails.folding import pattern
from millrace.server.gateway.guardrails.numbers import DASHES, Place

_NAME = pattern(rb"(?:ssn|social security|social security (?:number|no|num|nr))\.?(?: is)?[ :=#.\-\x96]{0,3}\z")
# Names end so; a search for the whole would read all of what stands before.
_MAX_NAME = 40


def ssn(place: Place) -> int:
    """Length of the SSN that begins here; 0: there is none."""
    parts = place.groups[:3]
    if parts and len(parts[0].digits) == 9:
        return parts[0].end if _is_issued(parts[0].digits) and _named(place.left) else 0
    separators = {part.separator for part in parts[1:]}
    if [len(part.digits) for part in parts] != [3, 2, 4] or separators not in ({b"-"}, {b" "}):
        return 0
    digits = b"".join(part.digits for part in parts)
    apart = place.detached(glue=DASHES) or _named(place.left)
    return parts[-1].end if apart and _is_issued(digits) else 0


def _named(left: bytes) -> bool:
    return _NAME.search(left[-_MAX_NAME:]) is not None


def _is_issued(digits: bytes) -> bool:
    """Area 000, 666 and 900 to 999, group 00 and serial number 0000 are never given out."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in (b"000", b"666") and area < b"900" and group != b"00" and serial != b"0000"

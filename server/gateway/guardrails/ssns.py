"""United States social security numbers: 3, 2 and 4 digits, or 9 together where they are named."""

from itertools import islice

from millrace.server.gateway.guardrails.folding import LONG_DASH, pattern
from millrace.server.gateway.guardrails.numbers import detached, groups

_NAME = pattern(rb"(?:ssn|social security|social security (?:number|no|num|nr))\.?(?: is)?[ :=#.\-\x96]{0,3}\z")
# Names end so; a search for the whole would read all of what stands before.
_MAX_NAME = 40


def ssn(left: bytes, view: bytes) -> int:
    """Length of the SSN that begins `view`, behind `left`; 0: there is none."""
    parts = list(islice(groups(view), 3))
    if parts and len(parts[0].digits) == 9:
        return parts[0].end if _is_issued(parts[0].digits) and _named(left) else 0
    separators = {part.separator for part in parts[1:]}
    if [len(part.digits) for part in parts] != [3, 2, 4] or separators not in ({b"-"}, {b" "}):
        return 0
    digits = b"".join(part.digits for part in parts)
    apart = detached(left, glue=b"-" + LONG_DASH) or _named(left)
    return parts[-1].end if apart and _is_issued(digits) else 0


def _named(left: bytes) -> bool:
    return _NAME.search(left[-_MAX_NAME:]) is not None


def _is_issued(digits: bytes) -> bool:
    """Area 000, 666 and 900 to 999, group 00 and serial number 0000 are never given out."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in (b"000", b"666") and area < b"900" and group != b"00" and serial != b"0000"

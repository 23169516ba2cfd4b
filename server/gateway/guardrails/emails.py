"""E-mail addresses (RFC 5321 lengths, internationalized names) in folded text.

The local part holds letters of scripts with upper and lower case, digits and `. _ % + - ! # $ & ' * ^ ~`, and
begins with a letter, digit or underscore. Of what RFC 5322 allows besides, `/ = ?`, backtick, braces and bar stand
before addresses far more often than in one. The last label of the domain has two letters or more and is no file
type of images.
"""

from millrace.server.gateway.guardrails.folding import CASED, UNCASED, pattern

MAX_LOCAL, MAX_DOMAIN, MAX_LABEL = 64, 253, 63
MAX_EMAIL = MAX_LOCAL + 1 + MAX_DOMAIN

_ASCII = b"abcdefghijklmnopqrstuvwxyz"
_DIGITS = b"0123456789"
_FIRST = _ASCII + _DIGITS + CASED + b"_"
_NOT_FIRST = b".%+-!#$&'*^~"
_LOCAL = _FIRST + _NOT_FIRST
_LETTERS = _ASCII + CASED
_LABEL = _LETTERS + _DIGITS + b"-"
_WIDE_LABEL = UNCASED + _DIGITS + b"-"
_DOMAIN = _LABEL + UNCASED + b"."
_IMAGES = frozenset({b"png", b"jpg", b"jpeg", b"gif", b"svg", b"webp"})  # icon@2x.png

# A character of a local part, @, a first label and the beginning of a second.
_PLACE = pattern(rb"[a-z0-9\xe0_.%+\-!#$&'*^~]@[a-z0-9\xe0\xe1-]+\.[a-z0-9\xe0\xe1]")


def find(data: bytes, start: int) -> int:
    """Index of the next @ from `start` on that may be one of an address; len(data): there is none."""
    if data.find(b"@", start) < 0:
        return len(data)
    match = _PLACE.search(data, start)
    return match.start() + 1 if match else len(data)


def local_length(left: bytes) -> int:
    """Length of the local part that ends `left`, of which MAX_LOCAL + 1 bytes are read; 0: there is none."""
    length = _local(left[-MAX_LOCAL - 1 :])
    return length if length <= MAX_LOCAL else 0


def domain_length(right: bytes) -> int:
    """Length of the longest domain that begins `right`, of which MAX_DOMAIN + 1 bytes are read; 0: there is none."""
    right = right[: MAX_DOMAIN + 1]
    run = right[: len(right) - len(right.lstrip(_DOMAIN))]
    best = start = 0
    for label in run.split(b"."):
        end = start + _top_level(label)
        if 0 < start < end <= MAX_DOMAIN:
            best = end
        if not _is_label(label):
            break
        start += len(label) + 1
    return best


def unsettled(data: bytes) -> int:
    """Index of the first character from which on an address may go on behind the end of `data`."""
    begin = len(data) - _local(data[-MAX_LOCAL:])
    at = len(data.rstrip(_DOMAIN)) - 1
    if data[at:].startswith(b"@") and len(data) - at - 1 <= MAX_DOMAIN:
        local = _local(data[max(at - MAX_LOCAL, 0) : at])
        begin = at - local if local else begin
    return begin


def _local(left: bytes) -> int:
    return len(left[len(left.rstrip(_LOCAL)) :].lstrip(_NOT_FIRST))


def _top_level(label: bytes) -> int:
    """Length of the last label of a domain that begins `label`, which a hyphen ends; 0: there is none."""
    if label.startswith(b"xn--"):
        return len(label) if _is_label(label) else 0
    if label.startswith(UNCASED):
        length = min(len(label) - len(label.lstrip(UNCASED)), MAX_LABEL)
    else:
        length = len(label) - len(label.lstrip(_LETTERS))
        if length > MAX_LABEL or label[length : length + 1].isdigit() or label in _IMAGES:
            return 0
    return length if length >= 2 else 0


def _is_label(label: bytes) -> bool:
    letters = _WIDE_LABEL if UNCASED in label else _LABEL
    edges = label.startswith(b"-") or label.endswith(b"-")
    return 0 < len(label) <= MAX_LABEL and not edges and not label.strip(letters)

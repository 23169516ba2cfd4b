"""Texts for the guard's tests: what it masks, what nearly looks like it, and what may stand between."""

from hypothesis import strategies as st

from millrace.server.gateway.guardrails.base import Finding
from millrace.server.gateway.guardrails.pii import MASKS


def with_check_digit(digits: str) -> str:
    """The digits and one more, so that ISO/IEC 7812 holds."""
    for last in "0123456789":
        total = 0
        for place, digit in enumerate(reversed(digits + last)):
            value = int(digit) * (1 + place % 2)
            total += value // 10 + value % 10
        if total % 10 == 0:
            return digits + last
    raise AssertionError


def _grouped(digits: str, sizes: tuple[int, ...], separator: str) -> str:
    parts, position = [], 0
    for size in sizes:
        parts.append(digits[position : position + size])
        position += size
    return separator.join(parts)


def _spell(parts: tuple[str, ...], separator: str) -> str:
    return separator.join(parts)


def digits(least: int, most: int | None = None) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=least, max_size=most or least)


visa = st.builds(lambda rest: with_check_digit("4" + rest), digits(14))
amex = st.builds(lambda rest: with_check_digit("37" + rest), digits(12))
seps = st.sampled_from([" ", "-", "\u00a0", "\u2009", "\u2011", "–", " - ", "\u200b \u200b"])
cards = (
    visa
    | amex
    | st.builds(_grouped, visa, st.sampled_from([(4, 4, 4, 4), (8, 8), (5, 5, 6)]), seps)
    | st.builds(_grouped, amex, st.just((4, 6, 5)), seps)
)
areas = st.integers(1, 899).filter(lambda area: area != 666).map("{:03}".format)
ssn_parts = st.tuples(areas, st.integers(1, 99).map("{:02}".format), st.integers(1, 9999).map("{:04}".format))
ssns = st.builds(_spell, ssn_parts, st.sampled_from(["-", " ", "\u2010", "\u00a0", " – "]))
plan = st.integers(200, 999).filter(lambda part: part % 100 != 11).map(str)
american = st.tuples(plan, plan, digits(4))
phones = (
    st.builds(_spell, american, st.sampled_from(["-", ".", " ", "\u202f", "–"]))
    | american.map(lambda parts: "({}) {}-{}".format(*parts))
    | american.map(lambda parts: "+1 ({}) {}-{}".format(*parts))
    | american.map(lambda parts: "+1" + "".join(parts))
    | digits(8).map(lambda rest: f"+33 {rest[0]} {rest[1:3]} {rest[3:5]} {rest[5:7]} 4{rest[7]}")
    | digits(8).map(lambda rest: f"0049 30 {rest}")
)
local = st.text("abcXYZ019._%+-'éж", max_size=8).map(lambda text: "u" + text)
domain = st.text("abz09é", min_size=1, max_size=8).map(lambda label: f"{label}.example")
emails = st.builds(lambda local, domain: f"{local}@{domain}", local, domain)
POSITIVES = {"card": cards, "ssn": ssns, "phone": phones, "email": emails}

# What begins, ends, continues or spoils a match, and what is nothing.
SCRAPS = [
    *"014+()-./,:;@_%'xéж日は٤４＠．—– \n\t]",
    *["00", "12", "123", "415", "555", "2671", "4111", "1111", "111111", "6789", "123456789", "  ", "......", "----"],
    *["com", "example.com", ".com", "@x.org", "a@", "www.", "https://", "ssn ", "SSN: ", "+1", "+49", "(415)", "no. "],
    *["[CARD]", "[PHONE]", "[EMAIL]", "[SSN]", "\u200b", "\u00ad", "\u0301", "\u202f", "\u200b" * 300],
    *["a" * 63, "a" * 66, "b." * 130, "1 2 3 " * 15, "12" * 40, "4111 1111 1111 1111", "378282246310005"],
    *["123-45-6789", "+14155552671", "415-555-2671", "u.v@example.org", "a@bc.de", "0049 30 901820"],
]
hostile = st.lists(st.sampled_from(SCRAPS), max_size=14).map("".join)


def rendered(findings: list[Finding], text: str, end: int) -> str:
    """What stands for the first `end` characters of a text with these findings; none may be cut by the end."""
    masked, position = "", 0
    for finding in findings:
        if finding.start < end:
            assert finding.end <= end, "a part of a match went out"
            masked += text[position : finding.start] + MASKS[finding.category]
            position = finding.end
    return masked + text[position:end]

"""Rules on generated data, lengths at their limits, and work that grows with the text only."""

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pii_texts import POSITIVES, digits, visa, with_check_digit

from millrace.server.gateway.guardrails.cards import luhn
from millrace.server.gateway.guardrails.pii import HOLD_BACK, PIIGuard

guard = PIIGuard()
before = st.sampled_from(["", "call ", "is: ", "(", '"', "= ", "no.", "日本", "\n", "[CARD]", "x\n"])
behind = st.sampled_from(["", " ", ".", ", and", ")", '"', "\n", " x", "日本", ": "])


@pytest.mark.parametrize("category", POSITIVES)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), before=before, behind=behind)
def test_generated(category, data, before, behind):
    if category == "email":
        before, behind = before.replace("no.", ""), behind.replace("日本", "")
    match = data.draw(POSITIVES[category])
    [finding] = guard.inspect(before + match + behind)
    start = len(before)
    assert (finding.category, finding.start, finding.end) == (category, start, start + len(match))


@settings(max_examples=100, deadline=None)
@given(number=visa, wrong=st.integers(1, 9), place=st.integers(0, 15))
def test_one_wrong_digit_is_no_card(number, wrong, place):
    """The check digit finds every error in one digit."""
    other = number[:place] + str((int(number[place]) + wrong) % 10) + number[place + 1 :]
    assert luhn(number.encode())
    assert not luhn(other.encode())
    assert guard.mask(other) == other


@settings(max_examples=100, deadline=None)
@given(number=digits(15).map(with_check_digit))
def test_a_valid_check_digit_alone_is_no_card(number):
    issued = guard.inspect(number) != []
    assert issued == (number[0] == "4" or issued)
    if number[0] in "0179":
        assert not issued


@pytest.mark.parametrize(
    ("address", "masked"),
    [
        ("a" * 64 + "@example.com", "[EMAIL]"),
        ("a" * 65 + "@example.com", None),
        ("a@" + "b" * 63 + ".example", "[EMAIL]"),
        ("a@" + "b" * 64 + ".example", None),
        ("a@" + "b." * 125 + "com", "[EMAIL]"),  # 253 characters
        ("a@" + "b." * 126 + "com", None),  # 255 characters; none shorter ends in a label of two letters
        ("a@b.com." + "c" * 64, "[EMAIL]." + "c" * 64),
        ("a@b.com" + ".cc" * 90, "[EMAIL]" + ".cc" * 8),
    ],
)
def test_lengths(address, masked):
    assert guard.mask(address) == (masked or address)


def test_invisible_characters_beyond_the_bound_end_a_match():
    near, far = "user@\u200bexample.com", "user@" + "\u200b" * HOLD_BACK + "example.com"
    assert guard.mask(near) == "[EMAIL]"
    assert guard.mask(far) == far


HOSTILE = {
    "digits": "1", "at": "@", "dots": ".", "plus": "+", "local": "a", "domain": "a@a.aa.", "local parts": "a@",
    "groups": "4111 ", "digits apart": "4 ", "addresses": "a@a.", "invisible": "4\u200b", "nine": "123456789 ",
    "parentheses": "((", "ssn": "ssn 12345678 ", "plus groups": "+1 ", "wide": "４", "dashes": "4-",
}  # fmt: skip


class Effort:
    """Calls of Python functions; the work within regular expressions is linear by their construction."""

    def __init__(self, text: str, chunk: int):
        self.calls = 0
        stage = guard.stream()
        sys.setprofile(self._count)
        try:
            for start in range(0, len(text), chunk):
                stage.push(text[start : start + chunk])
            stage.finish()
        finally:
            sys.setprofile(None)

    def _count(self, frame, event, argument):
        self.calls += event in ("call", "c_call")


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_work_grows_with_the_text(unit, chunk):
    text = unit * (2048 // len(unit))
    some, more = (Effort(text * times, chunk).calls for times in (1, 4))
    assert more <= 4.5 * some + 1000


@pytest.mark.parametrize("name", ["digits", "at", "dots", "plus", "local"])
def test_a_mebibyte_of_one_character_takes_no_time(name):
    text = HOSTILE[name] * (1 << 20)
    started = time.process_time()
    assert guard.inspect(text) == []
    assert time.process_time() - started < 0.5  # about 5 ms on a free core


def test_nothing_is_logged():
    script = (
        "from millrace.server.gateway.guardrails.pii import PIIGuard\n"
        "PIIGuard().mask('\\ud800 \\x00 ' + '4111 ' * 20000 + '@' * 20000)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")

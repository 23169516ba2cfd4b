"""For every text and every way to cut it: streamed output = mask(full text), and no character of a match goes out."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pii_texts import POSITIVES, SCRAPS, hostile, rendered

from millrace.bench.guardrails import labelled
from millrace.server.gateway.guardrails.base import Finding
from millrace.server.gateway.guardrails.pii import HOLD_BACK, PIIGuard

guard = PIIGuard()
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def chunks_of(text: str, edges: list[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise([0, *sorted(edges), len(text)])]


def check(text: str, chunks: list[str]) -> None:
    stage, findings = guard.stream(), guard.inspect(text)
    sent, read, settled = "", 0, 0
    for chunk in [*chunks, None]:
        pieces = stage.finish() if chunk is None else stage.push(chunk)
        read += len(chunk or "")
        sent += "".join(piece.text for piece in pieces)
        settled += sum(piece.source for piece in pieces)
        assert read - settled < HOLD_BACK
        assert sent == rendered(findings, text, settled)
    assert (sent, settled) == (guard.mask(text), len(text))


@relaxed
@given(data=st.data(), text=hostile)
def test_streamed_equals_whole(data, text):
    check(text, chunks_of(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12))))


@relaxed
@given(text=hostile, size=st.integers(1, 5))
def test_streamed_in_small_pieces_equals_whole(text, size):
    check(text, [text[i : i + size] for i in range(0, len(text), size)])


@pytest.mark.parametrize("seed", range(4))
def test_many_texts(seed):
    """What Hypothesis does, without its care for small examples: so, many more."""
    source = random.Random(seed)
    for _ in range(500):
        text = "".join(source.choices(SCRAPS, k=source.randrange(16)))
        check(text, chunks_of(text, [source.randrange(len(text) + 1) for _ in range(source.randrange(9))]))
        masked = guard.mask(text)
        assert guard.mask(masked) == masked


@pytest.mark.parametrize("category", POSITIVES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_match_at_every_place_of_two_cuts(category, data):
    text = "x " + data.draw(POSITIVES[category]) + data.draw(st.sampled_from(["", " ", ".", ", y", "\n", "）"]))
    assert [finding.category for finding in guard.inspect(text)] == [category]
    for first in range(1, len(text)):
        check(text, chunks_of(text, [first, data.draw(st.integers(1, len(text)))]))


@pytest.mark.parametrize("line", labelled(Path(__file__).parent / "labelled.txt"), ids=lambda line: line.text[:30])
def test_labelled_lines_cut_everywhere(line):
    check(line.text, list(line.text))
    if not line.spans:
        return
    for cut in range(1, len(line.text)):
        check(line.text, chunks_of(line.text, [cut]))


LONGEST = {
    "email": "a" * 64 + "@" + "b." * 125 + "com",
    "phone": "(+49) - (0) - " + " - ".join("309018201234"),
    "card": "4111 - " + " - ".join(["111"] * 4) + " - 003",
}


@pytest.mark.parametrize("category", LONGEST)
@pytest.mark.parametrize("behind", ["", " ", "1", "x", ".cc", " - 1", "-", "é"])
@pytest.mark.parametrize("between", ["", "\u200b", "\u200b" * 3])
def test_the_longest_matches(category, behind, between):
    """What stands behind a match decides whether it is one, so that it must be held to its end and beyond."""
    match = LONGEST[category]
    assert guard.inspect(match) == [Finding(category, 0, len(match))]
    text = between.join(match) + behind
    for size in (1, 7):
        check(text, [text[i : i + size] for i in range(0, len(text), size)])
    for cut in range(len(text) - 5, len(text)):
        check(text, chunks_of(text, [cut]))


@pytest.mark.parametrize("match", ["user@example.com", "4111111111111111", "+14155552671"])
@pytest.mark.parametrize("behind", ["", " ", "5", "x"])
def test_matches_as_long_as_the_bound(match, behind):
    for invisible in range(HOLD_BACK - len(match) - 3, HOLD_BACK - len(match) + 4):
        text = match[:5] + "\u200b" * invisible + match[5:] + behind
        check(text, list(text))
    longest = match[:5] + "\u200b" * (HOLD_BACK - len(match)) + match[5:]
    assert guard.inspect(longest + behind)[0].end == HOLD_BACK


@relaxed
@given(text=hostile)
def test_masking_again_changes_nothing(text):
    assert guard.mask(guard.mask(text)) == guard.mask(text)


@relaxed
@given(first=hostile, second=hostile)
def test_lines_are_masked_on_their_own(first, second):
    assert guard.mask(f"{first}\n{second}") == f"{guard.mask(first)}\n{guard.mask(second)}"


@relaxed
@given(text=hostile)
def test_findings_are_in_order_and_apart(text):
    findings = guard.inspect(text)
    assert all(finding.start < finding.end for finding in findings)
    assert all(one.end <= other.start for one, other in pairwise(findings))


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Hello", "Hello"),  # it could be the beginning of an address
        ("Hello ", ""),
        ("Hello, ", ""),
        ("Prices begin at 20 ", "20 "),
        ("Prices begin at 20 e", "e"),
        ("Ask (", "("),
        ("3 + ", "3 + "),
        ("日本語のテキスト", ""),
        ("a" * 65, "a" * 64),
        ("user@example.com", "user@example.com"),
        ("user@example.com ", ""),
        ("...---", ""),
        ("4111 1111 1111 1111", "4111 1111 1111 1111"),
        ("4111 1111 1111 1111.", "4111 1111 1111 1111."),
        ("1 " * 100, "1 " * 35),
        ("x" + "\u200b" * 1000, ""),
    ],
)
def test_what_is_held(text, held):
    stage = guard.stream()
    sent = sum(piece.source for piece in stage.push(text))
    assert text[sent:] == held

"""The universal property: for every input and every chunking, streamed output joined = unary output."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.server.text.detokenizer import Detokenizer
from millrace.server.text.holdback import Piece, Pipeline
from millrace.server.text.stream import NOTHING, TextStream

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def some_ids(tokenizer):
    random_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)
    texts = st.text("abc 😀é\u0301日the.\n", max_size=10).map(tokenizer.encode)
    return st.lists(random_ids | texts, max_size=4).map(lambda parts: [id for part in parts for id in part])


def cut(data, items: list) -> list[list]:
    edges = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=6)))
    return [items[start:end] for start, end in zip([0, *edges], [*edges, len(items)], strict=True)]


def stops_in(data, text: str) -> tuple[str, ...]:
    """Strings of the text itself, so that they match, and others that nearly do."""
    if not text:
        return ()
    spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6)).map(lambda span: text[span[0] : sum(span)])
    return tuple(data.draw(st.lists(spans | spans.map(lambda stop: stop + "!"), max_size=3)))


def earliest(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    for end in range(len(text) + 1):
        if matching := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(matching, key=len)
    return None


def spans_of(tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(id)[1:] for id in ids]


@relaxed
@given(data=st.data(), include=st.booleans())
def test_streamed_equals_whole(tokenizer, data, include):
    ids = data.draw(some_ids(tokenizer))
    whole = tokenizer.decode(ids)
    stops = stops_in(data, whole)
    stream = TextStream(tokenizer, stops, include)
    emitted = [stream.push(chunk) for chunk in cut(data, ids)] + [stream.finish()]
    text, tokens = "".join(part.text for part in emitted), sum(part.tokens for part in emitted)
    matches = [part.stop_string for part in emitted if part.stop_string is not None]

    found = earliest(whole, stops)
    if found is None:
        assert (text, tokens, matches) == (whole, len(ids), [])
        return
    end, stop = found
    spans = spans_of(tokenizer, ids)
    assert matches == [stop]
    if include:
        assert text == whole[:end]
        contributors = [i for i, (start, stop_) in enumerate(spans) if start < stop_ and start < end]
        assert tokens == contributors[-1] + 1
    else:
        assert text == whole[: end - len(stop)]
        assert tokens == next(i for i, (_, token_end) in enumerate(spans) if token_end > end - len(stop))


@relaxed
@given(data=st.data())
def test_a_token_goes_out_with_its_last_character_and_not_later(tokenizer, data):
    ids = data.draw(some_ids(tokenizer))
    stops = tuple(stop + " near miss" for stop in stops_in(data, tokenizer.decode(ids)))  # near misses only
    spans, stream = spans_of(tokenizer, ids), TextStream(tokenizer, stops)
    pushed = sent = released = 0
    for chunk in cut(data, ids):
        part = stream.push(chunk)
        pushed, sent, released = pushed + len(chunk), sent + len(part.text), released + part.tokens
        assert released == sum(end <= sent for _, end in spans[:pushed])
    assert released + stream.finish().tokens == len(ids)


@relaxed
@given(data=st.data())
def test_after_the_end_nothing_comes(tokenizer, data):
    ids = data.draw(some_ids(tokenizer))
    for stops in ((), stops_in(data, tokenizer.decode(ids))):
        stream = TextStream(tokenizer, stops)
        stream.push(ids)
        stream.finish()
        assert stream.push(ids) == stream.finish() == NOTHING


class Mask:
    """A stage as later ones will be: digits and @ become one sign, however long the run; `_` is deleted."""

    PATTERN = re.compile(r"[0-9@]+$")

    def __init__(self) -> None:
        self.held = ""

    def push(self, text: str) -> list[Piece]:
        text = self.held + text
        tail = self.PATTERN.search(text)
        self.held = text[tail.start() :] if tail else ""
        return self._pieces(text[: len(text) - len(self.held)])

    def finish(self) -> list[Piece]:
        text, self.held = self.held, ""
        return self._pieces(text)

    def _pieces(self, text: str) -> list[Piece]:
        parts = re.findall(r"[0-9@]+|_|[^0-9@_]+", text)
        return [Piece(masked(part), len(part)) for part in parts]


def masked(text: str) -> str:
    return re.sub(r"[0-9@]+", "[number]", text).replace("_", "")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), text=st.text("a1@_ ]é", max_size=25))
def test_a_stage_that_replaces_text(tokenizers, data, text):
    """Tokens stand for the original text, text for what the stage made of it."""
    tokenizer = tokenizers["builtin"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = tuple(data.draw(st.lists(st.sampled_from(["a[n", "]a", "r]", "aa", "[number] "]), max_size=2)))
    stream = TextStream(tokenizer, stops, stages=[Mask()])
    emitted = []
    released = sent = 0
    for part in [*(stream.push(chunk) for chunk in cut(data, ids)), stream.finish()]:
        emitted.append(part)
        released, sent = released + part.tokens, sent + len(part.text)
        original = tokenizer.decode(ids[:released])
        assert len(masked(original)) <= sent or text.startswith((original + "1", original + "@"))
    joined, whole = "".join(part.text for part in emitted), masked(text)
    found = earliest(whole, stops)
    if found is None:
        assert (joined, released) == (whole, len(ids))
    else:
        assert joined == whole[: found[0] - len(found[1])]
        assert released < len(ids)


class Script:
    """A stage that gives out prepared pieces, one list a push."""

    def __init__(self, *pushes: list[Piece]):
        self.pushes = list(pushes)

    def push(self, text: str) -> list[Piece]:
        return self.pushes.pop(0)

    def finish(self) -> list[Piece]:
        return []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([Piece("abcdef", 6)], [Piece("abc", 3)], 3),  # one by one
        ([Piece("XY", 6)], [Piece("X", 1)], 0),  # a replacement counts when all of it is out
        ([Piece("XY", 6)], [Piece("XY", 2)], 6),
        ([Piece("ab", 2), Piece("", 4)], [Piece("ab", 2)], 6),  # what is deleted behind it counts at once
        ([Piece("", 4), Piece("ab", 2)], [], 4),
        ([Piece("ab", 2), Piece("XYZ", 1), Piece("c", 1)], [Piece("abX", 3)], 2),
        ([Piece("ab", 2), Piece("XYZ", 1), Piece("c", 1)], [Piece("!", 5)], 3),  # replaced again downstream
    ],
)
def test_what_counts_as_settled(first, second, expected):
    text, settled = Pipeline([Script(first), Script(second)]).push("abcdef")
    assert (text, settled) == ("".join(piece.text for piece in second), expected)


def test_held_text_is_settled_by_a_later_push():
    pipeline = Pipeline([Script([Piece("XYZ", 5)], [Piece("d", 1)]), Script([Piece("XY", 2)], [Piece("Zd", 2)])])
    assert [pipeline.push("abcde"), pipeline.push("f")] == [("XY", 0), ("Zd", 6)]

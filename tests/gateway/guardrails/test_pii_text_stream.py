"""The guard between detokenizer and stop strings, on tokens that are single bytes."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pii_texts import hostile, rendered
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from millrace.bench.guardrails import labelled
from millrace.server.gateway.guardrails.pii import MASKS, PIIGuard
from millrace.server.text.holdback import Piece, Pipeline
from millrace.server.text.pieces import BYTE_ALPHABET
from millrace.server.text.stream import TextStream
from millrace.server.text.tokenizer import Tokenizer

guard = PIIGuard()
relaxed = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Token n is byte n."""
    directory = tmp_path_factory.mktemp("bytes")
    backend = Backend(models.BPE(dict(BYTE_ALPHABET), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer.load(directory)


def matches_in_bytes(text: str) -> list[tuple[int, int]]:
    return [(len(text[: finding.start].encode()), len(text[: finding.end].encode())) for finding in guard.inspect(text)]


def emitted_by(stream: TextStream, ids: bytes, edges: list[int]):
    for start, end in pairwise([0, *sorted(edges), len(ids)]):
        yield stream.push(ids[start:end])
    yield stream.finish()


def check(tokenizer: Tokenizer, text: str, edges: list[int]) -> None:
    ids, findings, masked = text.encode(), guard.inspect(text), guard.mask(text)
    sent, released = "", 0
    for part in emitted_by(TextStream(tokenizer, stages=[guard.stream()]), ids, edges):
        sent, released = sent + part.text, released + part.tokens
        assert masked.startswith(sent)
        whole = len(ids[:released].decode("utf-8", "ignore"))
        assert sent.startswith(rendered(findings, text, whole)), "tokens went out before their text"
    assert (sent, released) == (masked, len(ids))


@relaxed
@given(data=st.data(), text=hostile)
def test_every_split_of_the_bytes(tokenizer, data, text):
    check(tokenizer, text, data.draw(st.lists(st.integers(0, len(text.encode())), max_size=10)))


@relaxed
@given(text=hostile)
def test_byte_by_byte(tokenizer, text):
    check(tokenizer, text, list(range(len(text.encode()))))


@pytest.mark.parametrize(
    "line",
    [line for line in labelled(Path(__file__).parent / "labelled.txt") if line.spans],
    ids=lambda line: line.text[:30],
)
def test_labelled_lines_cut_at_every_byte(tokenizer, line):
    for cut in range(len(line.text.encode())):
        check(tokenizer, line.text, [cut])


@relaxed
@given(data=st.data(), text=hostile)
def test_stop_strings_see_the_masks(tokenizer, data, text):
    """Also when a stop string begins or ends in a mask, no token of a match goes out before all of its mask."""
    stop = data.draw(st.sampled_from(["L]", "[C", "E] ", "[PHONE]", "x", "] [", "D]\n", "N]!"]))
    ids, masked = text.encode(), guard.mask(text)
    edges = data.draw(st.lists(st.integers(0, len(ids)), max_size=10))
    sent, released, ends = "", 0, mask_ends(text)
    for part in emitted_by(TextStream(tokenizer, [stop], stages=[guard.stream()]), ids, edges):
        sent, released = sent + part.text, released + part.tokens
        for (start, end), mask_end in ends.items():
            assert released <= start or (released >= end and len(sent) >= mask_end)
    assert sent == masked.partition(stop)[0]


def mask_ends(text: str) -> dict[tuple[int, int], int]:
    """Bytes of each match, and where its mask ends in the masked text."""
    ends, growth = {}, 0
    for finding, span in zip(guard.inspect(text), matches_in_bytes(text), strict=True):
        growth += len(MASKS[finding.category]) - (finding.end - finding.start)
        ends[span] = finding.end + growth
    return ends


def test_a_mask_as_long_as_its_match_is_settled_as_a_whole():
    """`a@bc.de` has the length of its mask."""

    class Hold:
        """Lets the first half of a mask out and keeps the rest."""

        def push(self, text):
            return [Piece(text[:4], 4)]

        def finish(self):
            return []

    assert Pipeline([guard.stream(), Hold()]).push("a@bc.de ") == ("[EMA", 0)

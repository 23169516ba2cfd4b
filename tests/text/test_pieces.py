"""Entries to bytes, against the decoders of the `tokenizers` library."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from millrace.server.errors import CheckpointError
from millrace.server.text.detokenizer import Detokenizer
from millrace.server.text.pieces import pieces_of

REPLACE = decoders.Replace("▁", " ")
DECODERS = {
    "byte level": decoders.ByteLevel(),
    "byte level in a sequence": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "gemma": decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse()]),
    "llama": decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "strip 3": decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
}
ENTRIES = st.lists(st.text("▁aĠé☃ð", min_size=1, max_size=3) | st.sampled_from(["<0x41>", "<0xe2>", "<0x5>", "▁", "Ċ"]))


@pytest.mark.parametrize("kind", DECODERS)
@given(entries=ENTRIES)
def test_whole_and_incremental_equal_the_library(kind, entries):
    decoder = DECODERS[kind]
    pieces = pieces_of(json.loads(decoder.__getstate__()))
    expected = decoder.decode(entries)
    whole = pieces.join(map(pieces.to_bytes, entries)).decode("utf-8", "replace")
    if not ("<0xe2>" in entries and "\ufffd" in expected):  # there the library gives up the whole run of byte tokens
        assert whole == expected
    table = SimpleNamespace(pieces=pieces, special_ids=(), token_bytes=lambda i: pieces.to_bytes(entries[i]))
    detokenizer = Detokenizer(table)
    texts = [detokenizer.push(i).text for i in range(len(entries))]
    assert "".join(texts) + detokenizer.finish() == whole


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.CTC(), decoders.BPEDecoder(), decoders.Strip("x", 1, 0)]
)
def test_other_decoders_are_refused(decoder):
    with pytest.raises(CheckpointError, match="not supported"):
        pieces_of(json.loads(decoder.__getstate__()))

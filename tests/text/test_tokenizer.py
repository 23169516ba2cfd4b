"""The tokenizer against Hugging Face's, and against files that nobody should load."""

import contextlib
import hashlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from millrace.server.config import BUILTIN
from millrace.server.errors import CheckpointError, InvalidRequest
from millrace.server.text.tokenizer import Tokenizer

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
WORDS = st.sampled_from(
    ["The mill ", "race", "  ", "\n\n", "é", "e\u0301", "日本", "😀", "👩‍👩‍👧", "<s>", "</s>", "<|im_start|>", "[INST]",
     "<unk>", "<|user|>", "<|endoftext|>", "<0x41>", "<think>", "▁", "\ufdef", "\ufdd0", "\u2028", "ﬁ", "\x00", "<|im_",
     "start|>"]
)  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=8), max_size=12).map("".join)


@pytest.fixture(scope="module")
def theirs(directory) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(directory)


def plain(text: str, tokenizer: Tokenizer) -> bool:
    return not any(name in text for name in tokenizer.special.ids) and "<think>" not in text


@relaxed
@given(text=TEXTS)
def test_ids_equal_those_of_transformers(tokenizer, theirs, text):
    if plain(text, tokenizer):
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


def test_bos_is_added_as_the_post_processor_or_else_the_configuration_says(tokenizers, directories):
    theirs = PreTrainedTokenizerFast.from_pretrained(directories["byte_level"])
    assert tokenizers["byte_level"].encode("The mill") == theirs.encode("The mill")
    assert tokenizers["byte_fallback"].encode("x")[0] == tokenizers["byte_fallback"].bos_id == 1
    assert tokenizers["unigram"].encode("") == []
    builtin = tokenizers["builtin"]  # no post-processor, add_bos_token
    assert builtin.encode("x") == [builtin.bos_id, *builtin.encode("x", add_special_tokens=False)]


@relaxed
@given(text=TEXTS)
def test_markers_of_special_tokens_in_text_are_plain_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.special.id("unk_token") or tokenizer.special.ids.get("<unk>")
    assert not tokenizer.special_ids.intersection(ids) - {unknown}


@relaxed
@given(text=TEXTS)
def test_byte_vocabularies_give_the_text_back(tokenizers, text):
    for family in ("byte_level", "builtin"):
        assert tokenizers[family].decode(tokenizers[family].encode(text)) == text
    if "▁" not in text and "\0" not in text and not text.startswith(" ") and "<0x41>" not in text:
        assert tokenizers["byte_fallback"].decode(tokenizers["byte_fallback"].encode(text)) == text


@relaxed
@given(data=st.data())
def test_decoding_random_ids_equals_transformers(tokenizer, theirs, family, data):
    """Except that transformers gives up a whole run of byte tokens when one of them is wrong."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip in (True, False):
        ours, reference = tokenizer.decode(ids, skip), theirs.decode(ids, skip_special_tokens=skip)
        if family in ("byte_fallback", "legacy") and "\ufffd" in reference:
            assert ours.replace("\ufffd", "") != "" or "\ufffd" in ours
        else:
            assert ours == reference


@relaxed
@given(text=TEXTS)
def test_byte_offsets_cut_the_text_where_tokens_lie(tokenizer, family, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    data, spans = text.encode(), list(zip(offsets[::2], offsets[1::2], strict=True))
    assert len(spans) == len(ids)
    for start, end in spans:
        assert 0 <= start <= end <= len(data)
        data[start:end].decode()
    if family in ("byte_level", "builtin"):
        covered = {byte for start, end in spans for byte in range(start, end)}
        assert len(covered) == len(data)
        for token_id, (start, end) in zip(ids, spans, strict=True):
            if start < end:
                assert tokenizer.token_bytes(token_id) in data[start:end]


def test_token_bytes(tokenizers):
    byte_level, byte_fallback = tokenizers["byte_level"], tokenizers["byte_fallback"]
    singles = {byte_level.token_bytes(id) for id in range(byte_level.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= singles
    assert byte_level.token_bytes(byte_level.bos_id) == b"<s>"
    assert byte_level.token_bytes(byte_level.vocab_size) == b""
    assert byte_level.token_bytes(-1) == b""
    singles = [byte_fallback.token_bytes(id) for id in range(byte_fallback.vocab_size)]
    assert {bytes([byte]) for byte in range(256)} <= set(singles)
    assert "é".encode() == b"".join(map(byte_fallback.token_bytes, byte_fallback.encode("é")[2:]))


def test_facts(directory, tokenizer, theirs):
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.special_ids == set(theirs.all_special_ids) | tokenizer.special_ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.sha256 == hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()


def test_a_lone_surrogate_is_the_clients_fault(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_a_long_text_takes_linear_work(tokenizers):
    assert len(tokenizers["builtin"].encode("<" * 200_000)) <= 200_001


def broken(**changes) -> bytes:
    file = json.loads((BUILTIN / "tokenizer.json").read_bytes())
    return json.dumps(file | changes).encode()


MODEL = json.loads((BUILTIN / "tokenizer.json").read_bytes())["model"]
BROKEN = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"a": "\xff"}',
    "truncated": (BUILTIN / "tokenizer.json").read_bytes()[:10_000],
    "a list": b"[]",
    "a number": b"3",
    "too deep": b"[" * 100_000,
    "no model": broken(model=None),
    "unknown model": broken(model=MODEL | {"type": "Magic"}),
    "no vocabulary": broken(model=MODEL | {"vocab": {}}, added_tokens=[]),
    "vocabulary of strings": broken(model=MODEL | {"vocab": {"a": "b"}}),
    "vocabulary of numbers": broken(model=MODEL | {"vocab": [1, 2]}),
    "negative id": broken(model=MODEL | {"vocab": {"a": -1}}),
    "huge id": broken(model=MODEL | {"vocab": {"a": 4_000_000_000}}),
    "merge of unknown tokens": broken(model=MODEL | {"merges": [["☃", "☃"]]}),
    "merges of numbers": broken(model=MODEL | {"merges": [1, 2]}),
    "no decoder": broken(decoder=None),
    "unsupported decoder": broken(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "unknown decoder": broken(decoder={"type": "Magic"}),
    "added tokens are numbers": broken(added_tokens=[1]),
    "added tokens are an object": broken(added_tokens={"a": 1}),
    "a lone surrogate": broken(model=MODEL | {"vocab": {"\ud800": 0}, "merges": []}),
    "unigram without vocabulary": broken(model={"type": "Unigram", "unk_id": 7, "vocab": []}, added_tokens=[]),
    "unigram with a bad unk": broken(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}, added_tokens=[]),
    "bad expression": broken(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_tokenizers_are_refused_in_one_line(tmp_path, kind):
    (tmp_path / "tokenizer.json").write_bytes(BROKEN[kind])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((BUILTIN / "tokenizer.json").read_bytes())
    assert Tokenizer.load(tmp_path).bos_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|endoftext|>"}}')
    assert Tokenizer.load(tmp_path).bos_id == 0
    for content in ('{"bos_token": "<nowhere>"}', "[1]", "{", '"text"', '{"additional_special_tokens": 3}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError) as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_end_in_anything_but_an_error_or_a_tokenizer(tmp_path_factory, directories, data):
    raw = bytearray((directories["unigram"] / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b'0-9{}[]",:\x00\xff ntf'))
    path = tmp_path_factory.mktemp("damaged")
    (path / "tokenizer.json").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        Tokenizer.load(path).encode("The mill race")

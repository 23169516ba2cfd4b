"""Checkpoints of random weights are those of the shapes they are named after, to us and to others."""

import json
from pathlib import Path

import numpy as np
import pytest

from millrace.bench.checkpoints import SHAPES, checkpoint, write_checkpoint
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.fields import Fields
from millrace.server.model.registry import model_spec
from millrace.server.model.weights import find_weights, stream_weights
from millrace.server.text.tokenizer_file import TokenizerFile


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("tiny", tmp_path_factory.mktemp("work"))


def test_parameters_are_those_of_the_published_models() -> None:
    counts = {name: model_spec(Fields(config, name)).parameters for name, config in SHAPES.items()}
    assert (counts["llama-3.2-1b"], counts["qwen2.5-0.5b"]) == (1_235_814_400, 494_032_768)


def test_norms_are_ones_and_the_rest_is_normal(tiny: Path) -> None:
    for weight, values in stream_weights(find_weights(Checkpoint.open(tiny)), lambda done, total: None):
        if weight.role.endswith("norm"):
            assert (values == 1).all()
        else:
            assert abs(values.mean()) < 0.001
            assert values.std() == pytest.approx(0.02, rel=0.05)


def test_shards_hold_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SHAPES["tiny"], shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    pairs = zip(
        stream_weights(find_weights(Checkpoint.open(tiny)), lambda done, total: None),
        stream_weights(find_weights(Checkpoint.open(tmp_path)), lambda done, total: None),
        strict=True,
    )
    assert all(np.array_equal(one, other) for (_, one), (_, other) in pairs)


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_model_and_tokenizer(tiny: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer("The tide turns at noon.", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "The tide turns at noon."
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert logits.isfinite().all()
    assert 0.05 < logits.std() < 5
    assert len(logits.argmax(-1).unique()) > 1


def test_the_tokenizer_has_every_id_of_the_vocabulary(tiny: Path) -> None:
    file, config = TokenizerFile.read(tiny), SHAPES["tiny"]
    assert file.vocab_size == config["vocab_size"]
    assert file.special.id("bos_token") == config["bos_token_id"]
    assert file.special.id("eos_token") == config["eos_token_id"]
    assert len(json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]) == config["vocab_size"]


def test_what_an_interrupted_run_left_is_written_anew_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / "tiny.partial"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    directory = checkpoint("tiny", tmp_path)
    assert not left.exists()
    (directory / "mark").touch()
    assert (checkpoint("tiny", tmp_path) / "mark").exists()


def test_an_unknown_shape_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'llama-9'; there are llama-3.2-1b"):
        checkpoint("llama-9", tmp_path)

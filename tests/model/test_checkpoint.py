"""Damaged and absurd checkpoint directories: one line that names the file and the fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from millrace.kernels import _C
from millrace.server.config import BUILTIN, EngineConfig
from millrace.server.errors import CheckpointError
from millrace.server.model.checkpoint import Checkpoint, checkpoint_digest
from millrace.server.model.executors import create_executor
from millrace.server.model.weights import find_weights, stream_weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"


def edit_json(name: str, **changes: Any) -> Callable[[Path], object]:
    """Set fields; ... removes one."""

    def edit(directory: Path) -> None:
        path = directory / name
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return edit


def edit_tensors(**changes: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], object]:
    """Change tensors by name (with __ for dots); None removes one."""

    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        for name, change in changes.items():
            old = tensors.pop(name.replace("__", "."), torch.zeros(3))
            if change is not None:
                tensors[name.replace("__", ".")] = change(old).contiguous()
        save_file(tensors, directory / WEIGHTS)

    return edit


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor([len(tensor) - 1]), value)

    return change


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(data)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def only_pickle(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def config(**changes: Any) -> Callable[[Path], object]:
    return edit_json("config.json", **changes)


def rope(**section: Any) -> Callable[[Path], object]:
    return config(rope_parameters=section)


G = GATE.replace(".", "__")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "config.json: is missing"),
    "config is no JSON": (write("config.json", b"{"), "config.json: is no valid JSON"),
    "config is a list": (write("config.json", b"[]"), "config.json: must hold a JSON object"),
    "config nests too deep": (write("config.json", b'{"a":' * 100_000), "config.json: is no valid JSON"),
    "no architectures": (config(architectures=...), "architectures is missing"),
    "empty architectures": (config(architectures=[]), "architecture unnamed is not supported"),
    "unknown architecture": (config(architectures=["MambaForCausalLM"]), "MambaForCausalLM is not.*LlamaForCausalLM"),
    "architectures of numbers": (config(architectures=[1]), "list of strings"),
    "quantized": (config(quantization_config={"bits": 4}), "quantized"),
    "no hidden size": (config(hidden_size=...), "hidden_size is missing"),
    "null hidden size": (config(hidden_size=None), "hidden_size is missing"),
    "hidden size of text": (config(hidden_size="48"), 'hidden_size must be an integer .* not "48"'),
    "hidden size true": (config(hidden_size=True), "hidden_size must be an integer"),
    "negative layers": (config(num_hidden_layers=-1), "num_hidden_layers must be an integer from 1"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "absurd vocabulary": (config(vocab_size=10**12), "vocab_size"),
    "absurd integer": (write("config.json", b'{"vocab_size": 1' + b"0" * 5000 + b"}"), "config.json"),
    "heads that do not divide": (config(head_dim=None, num_attention_heads=5), "multiple of num_attention_heads"),
    "groups that do not divide": (config(num_key_value_heads=3), "multiple of num_key_value_heads"),
    "more groups than heads": (config(num_key_value_heads=8), "num_key_value_heads"),
    "odd head": (config(head_dim=13), "head_dim must be even"),
    "epsilon not a number": (config(rms_norm_eps="tiny"), "rms_norm_eps must be a number"),
    "epsilon NaN": (config(rms_norm_eps=float("nan")), "NaN is no JSON number"),
    "unknown activation": (config(hidden_act="mish"), "hidden_act is 'mish'; supported are silu"),
    "tied of text": (config(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false"),
    "no context": (config(max_position_embeddings=0), "max_position_embeddings"),
    "unknown scaling": (rope(rope_type="longrope", factor=4.0), "rope_type is 'longrope'; supported are default"),
    "scaling of text": (config(rope_parameters="yarn"), "rope_parameters must be an object"),
    "scaling without factor": (rope(rope_type="linear"), "factor is missing"),
    "scaling that shrinks": (rope(rope_type="linear", factor=0.5), "factor must be a number from 1"),
    "llama3 with crossed factors": (
        rope(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0),
        "must be less than",
    ),
    "theta of zero": (rope(rope_theta=0), "rope_theta"),
    "partial rotation": (rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "scaling by layer type": (rope(full_attention={"rope_type": "default"}), "differs between layer types"),
    "generation config is no JSON": (write("generation_config.json", b"?"), "generation_config.json: is no valid"),
    "temperature of text": (edit_json("generation_config.json", temperature="hot"), "temperature must be a number"),
    "top_p of zero": (edit_json("generation_config.json", top_p=0), "top_p"),
    "negative end token": (edit_json("generation_config.json", eos_token_id=[1, -1]), "eos_token_id"),
    "end token past the vocabulary": (edit_json("generation_config.json", eos_token_id=384), "eos_token_id"),
    "no weights": (remove(WEIGHTS), "holds neither model.safetensors nor"),
    "only pickled weights": (only_pickle, "pytorch_model.bin is a format that can run code"),
    "empty weights": (write(WEIGHTS, b""), "truncated"),
    "truncated header": (cut(WEIGHTS, 500), "truncated"),
    "truncated data": (cut(WEIGHTS, 50_000), "truncated"),
    "huge header": (write(WEIGHTS, b"\xff" * 8 + b"{}"), "truncated"),
    "missing tensor": (edit_tensors(**{G: None}), f"tensor {GATE} is missing"),
    "wrong shape": (edit_tensors(**{G: lambda t: t[1:]}), rf"tensor {GATE} has shape \[79, 48\].*\[80, 48\]"),
    "transposed": (edit_tensors(**{G: lambda t: t.T}), "has shape"),
    "unsupported dtype": (edit_tensors(**{G: lambda t: t.double()}), f"tensor {GATE} has dtype F64; supported"),
    "unexpected tensor": (edit_tensors(model__layers__0__self_attn__q_proj__bias=torch.clone), "has no place in"),
    "NaN": (edit_tensors(**{G: put(float("nan"))}), f"tensor {GATE} holds NaN or infinity"),
    "infinity": (edit_tensors(**{G: put(float("-inf"))}), f"tensor {GATE} holds NaN or infinity"),
    "NaN in bf16": (
        edit_tensors(**{G: lambda t: put(float("nan"))(t.bfloat16()), G.replace("gate", "up"): torch.Tensor.bfloat16}),
        f"tensor {GATE} holds NaN or infinity",
    ),
    "NaN in fp16": (
        edit_tensors(**{G: lambda t: put(float("nan"))(t.half()), G.replace("gate", "up"): torch.Tensor.half}),
        f"tensor {GATE} holds NaN or infinity",
    ),
    "NaN beside it": (
        edit_tensors(**{G.replace("gate", "up"): put(float("nan"))}),
        f"tensor {GATE.replace('gate', 'up')} holds NaN or infinity",
    ),
    "NaN in a norm": (
        edit_tensors(model__norm__weight=lambda t: t * float("nan")),
        r"tensor model\.norm\.weight holds NaN or infinity",
    ),
    "NaN in the table": (
        edit_tensors(model__embed_tokens__weight=put(float("nan"))),
        r"tensor model\.embed_tokens\.weight holds NaN or infinity",
    ),
}
SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (remove("model-00002-of-00005.safetensors"), "00002-of-00005.safetensors: this shard is missing"),
    "truncated shard": (cut("model-00002-of-00005.safetensors", 4000), "00002-of-00005.safetensors: is truncated"),
    "index is no JSON": (write(INDEX, b"{]"), "index.json: is no valid JSON"),
    "index without map": (edit_json(INDEX, weight_map=None), "tensor model.embed_tokens.weight is missing"),
    "map of numbers": (edit_json(INDEX, weight_map={"a": 1}), "must be a string"),
    "shard elsewhere": (edit_json(INDEX, weight_map={"a": "../model-00001-of-00005.safetensors"}), "beside the index"),
    "shard that is code": (edit_json(INDEX, weight_map={"a": "model.py"}), "beside the index"),
    "index that lies": (edit_json(INDEX, weight_map={"a": "model-00001-of-00005.safetensors"}), "tensor a is missing"),
}


def load(directory: Path, executor: Literal["cpu", "reference"] = "cpu") -> None:
    create_executor(EngineConfig(model=str(directory), max_num_seqs=1, executor=executor), lambda done, total: None)


@pytest.mark.parametrize("executor", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "fault"), [("llama", f) for f in DAMAGE] + [("llama-sharded", f) for f in SHARDED])
def test_damage_is_told_in_one_line(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, fault: str, executor: Literal["cpu", "reference"]
) -> None:
    damage, words = (DAMAGE | SHARDED)[fault]
    directory = shutil.copytree(checkpoint(name), tmp_path / "model")
    damage(directory)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(directory, executor)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert "\n" not in message
    assert len(message) < 500


def test_tensors_that_make_one_matrix_have_one_dtype(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    edit_tensors(**{G: torch.Tensor.half})(directory)
    with pytest.raises(CheckpointError, match=rf"{GATE}, .*up_proj\.weight have different dtypes: save them with one"):
        load(directory)
    load(directory, "reference")


@pytest.mark.parametrize("part", ["gate", "up"])
def test_numbers_beyond_bfloat16(checkpoint: Callable[[str], Path], tmp_path: Path, part: str) -> None:
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    other = "up" if part == "gate" else "gate"  # large, but not too large: not to blame
    edit_tensors(**{G.replace("gate", part): put(3.4e38), G.replace("gate", other): put(3.38e38)})(directory)
    with pytest.raises(
        CheckpointError, match=rf"{part}_proj\.weight holds 3\.4e\+38, which bfloat16 cannot: rescale it"
    ):
        load(directory)
    edit_tensors(**{G.replace("gate", part): put(3.39e38)})(directory)
    load(directory)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load(tmp_path / "file")


def test_linked_files_are_read(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The Hugging Face cache keeps links to blobs elsewhere."""
    for path in checkpoint("llama-sharded").iterdir():
        (tmp_path / path.name).symlink_to(path)
    load(tmp_path)
    linked, plain = (Checkpoint.open(path) for path in (tmp_path, checkpoint("llama-sharded")))
    build = ("avx2",)
    assert linked.fingerprint("reference", "float32", build) == plain.fingerprint("reference", "float32", build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_exact_and_counted(checkpoint: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype) -> None:
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    written = {name: tensor.to(dtype) for name, tensor in load_file(directory / WEIGHTS).items()}
    save_file(written, directory / WEIGHTS)
    seen: list[tuple[int, int]] = []
    read = {
        weight.name: values
        for weight, values in stream_weights(
            find_weights(Checkpoint.open(directory)), lambda *counts: seen.append(counts)
        )
    }
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(read[name], tensor.float().numpy())
    total = sum(tensor.nbytes for tensor in written.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_tied_checkpoints_may_carry_what_they_do_not_need(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("llama-tied"), tmp_path / "model")
    edit_tensors(lm_head__weight=torch.clone, model__layers__0__self_attn__rotary_emb__inv_freq=torch.clone)(directory)
    load(directory)


def test_fingerprint_follows_what_is_computed(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")

    def fingerprint(executor: str = "reference", precision: str = "float32", build: tuple[str, ...] = ("avx2",)) -> str:
        return Checkpoint.open(directory).fingerprint(executor, precision, build)

    edit_tensors()(directory)
    seen = [fingerprint(), fingerprint("cpu"), fingerprint(precision="int8"), fingerprint(build=("scalar",))]
    assert fingerprint() == seen[0]
    edit_tensors(**{G: lambda tensor: tensor * 1.01})(directory)
    seen.append(fingerprint())
    config(rms_norm_eps=1e-5)(directory)
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_digest_follows_what_a_gateway_and_its_worker_share(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    first = checkpoint_digest(directory)
    assert create_executor(EngineConfig(model=str(directory)), lambda done, total: None).info.checkpoint_digest == first
    edit_tensors(**{G: lambda tensor: tensor * 1.01})(directory)
    assert checkpoint_digest(directory) == first, "the gateway may lack the weights"
    (directory / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes() + b"\n")
    second = checkpoint_digest(directory)
    config(rms_norm_eps=1e-5)(directory)
    assert len({first, second, checkpoint_digest(directory)}) == 3
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        checkpoint_digest(directory)


def test_fingerprint_names_what_decides_the_last_bits(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instruction set and library of the reference; instruction set and precision of cpu, whatever PyTorch is there."""

    def fingerprint(**settings: Any) -> str:
        config = EngineConfig(model=str(checkpoint("llama")), **settings)
        return create_executor(config, lambda done, total: None).info.fingerprint

    seen = [fingerprint(), fingerprint(executor="reference")]
    for settings in (
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "int4", "quantization_group": 32},
        {"quantization": "int4", "head_quantization": "none"},
        {"kv_cache_dtype": "int8"},
    ):
        seen.append(fingerprint(**settings))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    seen.append(fingerprint(executor="reference"))
    monkeypatch.setattr(torch, "__version__", "0.1")
    seen.append(fingerprint(executor="reference"))
    assert fingerprint(num_threads=2) == seen[0]
    monkeypatch.setattr(_C, "isa", lambda: "another")
    seen += [fingerprint(), fingerprint(executor="reference")]
    assert len(set(seen)) == len(seen)


def test_generation_defaults(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    path = directory / "generation_config.json"

    def read(**values: Any) -> Any:
        path.write_text(json.dumps(values))
        return Checkpoint.open(directory).generation

    full = read(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, eos_token_id=[7, 9])
    sampling = full.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 20)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert full.eos_token_ids == (7, 9)
    assert read(do_sample=False, temperature=0.6).sampling.temperature == 0
    assert read().sampling.temperature == 1
    path.unlink()
    assert Checkpoint.open(directory).generation.eos_token_ids == (1,)


def test_builtin_opens() -> None:
    opened = Checkpoint.open(BUILTIN)
    assert opened.spec.architecture == "LlamaForCausalLM"
    assert opened.spec.tied

"""Logits and greedy tokens equal those of `transformers`, an implementation of somebody else.

The cpu executor's are near: what it rounds is rounded, and no more. Its integers are judged by the reference over the
very numbers that they stand for, so that what quantising a model costs is no excuse.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from millrace.kernels.matmul import pack
from millrace.server.config import EngineConfig
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.executors.precision import Precision, make_precision
from millrace.server.model.weights import find_weights, stream_weights

LENGTHS = (1, 15, 16, 17, 300)
CHUNK = 7
TOLERANCE = 1e-4
# Of the cpu executor: error of a prompt's logits as a part of their norm (one token's is at most twice that), and by
# how much of the logits' root mean square a token may lie behind the best one and still be chosen. Integers multiply
# activations of 8 bits.
NEAR = {"bf16": (0.02, 0.05), "int8": (0.04, 0.15), "int4": (0.04, 0.15)}
PRECISIONS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int8, kv int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4-g128, head int8": {"quantization": "int4"},
    "int4-g32": {"quantization": "int4", "quantization_group": 32, "head_quantization": "int4"},
}
NAMES = (
    "llama", "llama-biases", "llama-tied", "llama-sharded", "llama-linear", "llama-dynamic", "llama-llama3",
    "llama-yarn", "llama-yarn-fine", "mistral", "mistral-full", "qwen2", "qwen2-sliding", "qwen3", "qwen3-sliding",
)  # fmt: skip


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest, load: Callable, checkpoint: Callable[[str], Path]) -> tuple:
    """Ours and theirs."""
    loaded = load(request.param, block_size=16)
    return loaded.executor, open_by_transformers(checkpoint(request.param))


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(5)
    return [draw.integers(5, 384, length).tolist() for length in LENGTHS]


def test_every_architecture_is_here(checkpoint_names: list[str]) -> None:
    assert set(NAMES) == set(checkpoint_names)


@torch.inference_mode()
def test_logits_and_greedy_tokens(pair: tuple, steps: SimpleNamespace) -> None:
    ours, theirs = pair
    draw = np.random.default_rng(6)
    for prompt in prompts():
        blocks = draw.permutation(ours.kv_layout.num_blocks)[:24].tolist()
        expected = theirs(torch.tensor([prompt])).logits[0]
        actual = steps.all_logits(ours, prompt, CHUNK, blocks)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)

        output = steps.generate(ours, prompt, 64, blocks)
        judged = theirs(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        behind = judged.max(-1).values - judged[torch.arange(64), output]
        assert behind.max() <= TOLERANCE, "a token that is not the best one, nor level with it"
        if behind.max() == 0:
            assert output == judged.argmax(-1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_cpu_is_near(name: str, load: Callable, checkpoint: Callable[[str], Path], steps: SimpleNamespace) -> None:
    ours, theirs = load(name, "cpu").executor, open_by_transformers(checkpoint(name))
    draw = np.random.default_rng(6)
    for prompt in prompts():
        blocks = draw.permutation(ours.kv_layout.num_blocks)[:12].tolist()
        assert_near(steps.all_logits(ours, prompt, 300, blocks), logits_by(theirs, prompt), *NEAR["bf16"])
        output = steps.generate(ours, prompt, 64, blocks)
        judged = logits_by(theirs, prompt + output[:-1])[len(prompt) - 1 :]
        assert behind(judged, torch.tensor(output)).max() < NEAR["bf16"][1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "llama-sharded", "mistral", "qwen2", "qwen3"])
def test_integers_are_near_what_they_stand_for(
    name: str, precision: str, load: Callable, checkpoint: Callable, tmp_path: Path, steps: SimpleNamespace
) -> None:
    ours = load(name, "cpu", **PRECISIONS[precision])
    read_back(checkpoint(name), make_precision(EngineConfig(**PRECISIONS[precision])), tmp_path)
    theirs = open_by_transformers(tmp_path)
    for prompt in prompts():
        actual = steps.all_logits(ours.executor, prompt, 300, range(12))
        assert_near(actual, logits_by(theirs, prompt), *NEAR[precision[:4]])


def read_back(source: Path, precision: Precision, target: Path) -> None:
    """Write the checkpoint with each matrix as it comes out of its packed form."""
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*"))
    checkpoint = Checkpoint.open(source)
    spec = checkpoint.spec
    packings = dict.fromkeys(["head", "embedding"] if spec.tied else ["head"], precision.head)
    packings |= dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), precision.layers)
    tensors = {}
    for weight, values in stream_weights(find_weights(checkpoint), lambda done, total: None):
        if weight.role in packings:
            packing = packings[weight.role]
            values = pack(values, packing.width, packing.group).unpack()
        tensors[weight.name] = values
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def open_by_transformers(directory: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_by(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def behind(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """By how much of each row's root mean square the chosen token lies behind the best one."""
    apart = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
    return apart / logits.square().mean(-1).sqrt()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, error: float, slack: float) -> None:
    assert (actual - expected).norm() < error * expected.norm()
    assert ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 2 * error
    assert behind(expected, actual.argmax(-1)).max() < slack


def test_windows_and_scalings_matter(load: Callable, steps: SimpleNamespace) -> None:
    """The same weights under another setting give other logits: the cases above differ in more than name."""
    prompt = prompts()[-1]
    plain = steps.all_logits(load("llama").executor, prompt, 300, range(32))
    for name in ("llama-linear", "llama-llama3", "llama-yarn"):
        other = steps.all_logits(load(name).executor, prompt, 300, range(32))
        assert (plain - other).abs().max() > 0.1, name

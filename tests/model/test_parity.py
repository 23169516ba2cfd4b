"""Logits and greedy tokens equal those of `transformers`, an implementation of somebody else."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

LENGTHS = (1, 15, 16, 17, 300)
CHUNK = 7
TOLERANCE = 1e-4
NAMES = (
    "llama", "llama-biases", "llama-tied", "llama-sharded", "llama-linear", "llama-dynamic", "llama-llama3",
    "llama-yarn", "llama-yarn-fine", "mistral", "mistral-full", "qwen2", "qwen2-sliding", "qwen3", "qwen3-sliding",
)  # fmt: skip


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest, load: Callable, checkpoint: Callable[[str], Path]) -> tuple:
    """Ours and theirs."""
    loaded = load(request.param, block_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(request.param), dtype=torch.float32)
    return loaded.executor, theirs.eval()


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


def test_windows_and_scalings_matter(load: Callable, steps: SimpleNamespace) -> None:
    """The same weights under another setting give other logits: the cases above differ in more than name."""
    prompt = prompts()[-1]
    plain = steps.all_logits(load("llama").executor, prompt, 300, range(32))
    for name in ("llama-linear", "llama-llama3", "llama-yarn"):
        other = steps.all_logits(load(name).executor, prompt, 300, range(32))
        assert (plain - other).abs().max() > 0.1, name

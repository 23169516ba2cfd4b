"""A request gives the same logits alone, among others and in any chunking."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from millrace.server.model.executors import reference_model
from millrace.server.model.executors.base import Output

TOLERANCE = 1e-5
LENGTH = 150


@pytest.fixture(params=["llama", "mistral", "qwen2-sliding", "qwen3"])
def executor(request: pytest.FixtureRequest, load: Callable):
    return load(request.param).executor


def prompt(seed: int, length: int = LENGTH) -> list[int]:
    return np.random.default_rng(seed).integers(5, 384, length).tolist()


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunking(executor, chunk: int, steps: SimpleNamespace) -> None:
    whole = steps.all_logits(executor, prompt(1), LENGTH, range(10))
    pieces = steps.all_logits(executor, prompt(1), chunk, range(31, 20, -1))
    torch.testing.assert_close(pieces, whole, atol=TOLERANCE, rtol=0)


def test_long_rows_cut_into_pieces(executor, steps: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps.all_logits(executor, prompt(1), LENGTH, range(10))
    monkeypatch.setattr(reference_model, "MAX_SCORES", 4 * LENGTH * 11)
    pieces = steps.all_logits(executor, prompt(1), LENGTH, range(10))
    torch.testing.assert_close(pieces, whole, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_among_fifteen_others(executor, steps: SimpleNamespace) -> None:
    """One request decodes while others prefill and decode around it, at every place in the batch."""
    model, expected = executor.model, steps.all_logits(executor, prompt(1), LENGTH, range(10))
    others = [prompt(seed, 1 + 9 * seed % 40) for seed in range(2, 17)]
    for place, position in zip((0, 3, 15), (40, 149, 0), strict=True):
        row = steps.Row(prompt(1)[position : position + 1], position, range(10))
        rows = [
            steps.Row(ids, 0, range(10 + 4 * index, 14 + 4 * index), Output.NOTHING) for index, ids in enumerate(others)
        ]
        batch = steps.pack([*rows[:place], row, *rows[place:]])
        hidden = model.forward(batch, torch.from_numpy(batch.token_ids).long())
        actual = model.logits(hidden)[int(batch.offsets[place])]
        torch.testing.assert_close(actual, expected[position], atol=TOLERANCE, rtol=0)


def test_sixteen_streams_together_equal_each_alone(executor, steps: SimpleNamespace) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.9}
    prompts = [prompt(seed, 3 + seed) for seed in range(16)]
    tables = [range(6 * index, 6 * index + 6) for index in range(16)]
    alone = [
        steps.generate(executor, ids, 12, table, seed=seed, **sampling)
        for seed, (ids, table) in enumerate(zip(prompts, tables, strict=True))
    ]
    together = [list(ids) for ids in prompts]
    for step in range(12):
        rows = []
        for seed, (sequence, table) in enumerate(zip(together, tables, strict=True)):
            start = len(sequence) - 1 if step else 0
            rows.append(steps.Row(sequence[start:], start, table, sampling=sampling | {"seed": seed}))
        result = steps.run(executor, rows)
        for index, sequence in enumerate(together):
            sequence += steps.tokens(result, index)
    assert [sequence[len(ids) :] for sequence, ids in zip(together, prompts, strict=True)] == alone

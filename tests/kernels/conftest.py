"""Arguments of the sampling kernel, and the instruction sets to run it with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import _C

Columns = dict[str, NDArray[Any]]

SCALARS: dict[str, tuple[float, type[Any]]] = {
    "temperature": (1, np.float32),
    "top_p": (1, np.float32),
    "top_k": (0, np.int32),
    "min_p": (0, np.float32),
    "presence_penalty": (0, np.float32),
    "frequency_penalty": (0, np.float32),
    "repetition_penalty": (1, np.float32),
    "seed": (0, np.uint64),
    "choice": (0, np.int32),
    "position": (0, np.int32),
    "top_n": (-1, np.int32),
    "history_prompt_lens": (0, np.int32),
}


def make_columns(
    rows: int,
    bias: dict[int, list[tuple[int, float]]] | None = None,
    history: dict[int, tuple[list[int], list[int]]] | None = None,
    **values: Any,
) -> Columns:
    """All off but `values` (numbers or sequences), `bias` (row -> pairs) and `history` (row -> prompt, output)."""
    bias, history = bias or {}, history or {}
    columns: Columns = {
        name: np.array(np.broadcast_to(values.pop(name, default), rows), dtype)
        for name, (default, dtype) in SCALARS.items()
    }
    assert not values
    pairs = [pair for row in range(rows) for pair in bias.get(row, [])]
    tokens = [token for row in range(rows) for part in history.get(row, ([], [])) for token in part]
    columns["bias_offsets"] = offsets([len(bias.get(row, [])) for row in range(rows)])
    columns["bias_ids"] = np.array([token for token, _ in pairs], np.int32)
    columns["bias_values"] = np.array([value for _, value in pairs], np.float32)
    columns["history_offsets"] = offsets([sum(map(len, history.get(row, ([], [])))) for row in range(rows)])
    columns["history_ids"] = np.array(tokens, np.int32)
    for row, (prompt, _) in history.items():
        columns["history_prompt_lens"][row] = len(prompt)
    return columns


def offsets(lengths: list[int]) -> NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


@pytest.fixture(name="columns")
def columns_maker() -> Callable[..., Columns]:
    return make_columns


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    assert _C.isa() == request.param
    return str(request.param)

"""The native loops over ragged tables against their definitions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import ragged
from millrace.kernels.reference import ragged as reference

Int32 = NDArray[np.int32]


def int32(values: Any) -> Int32:
    return np.asarray(values, np.int32)


def integers(rng: np.random.Generator, low: int, high: int, *shape: int) -> Int32:
    return rng.integers(low, high, shape, np.int32)


def equal(got: Any, expected: Any) -> None:
    for ours, definition in zip(got, expected, strict=True):
        assert (ours.dtype, ours.flags.c_contiguous) == (definition.dtype, True)
        np.testing.assert_array_equal(ours, definition)


def step(rng: np.random.Generator, lanes: int, rows: int) -> list[Any]:
    """Random arguments of pack_tokens."""
    block_size, width = int(rng.integers(1, 40)), int(rng.integers(1, 300))
    tokens = integers(rng, 0, 2**31 - 1, lanes, width)
    blocks = integers(rng, 0, 10**6, lanes, -(-width // block_size) + int(rng.integers(3)))
    ends = integers(rng, 0, width + 1, rows)
    starts = int32(rng.integers(0, ends + 1)) if rng.random() < 0.5 else np.maximum(ends - 1, 0)
    return [integers(rng, 0, lanes, rows), starts, ends, tokens, blocks, block_size]


@pytest.mark.parametrize("seed", range(60))
def test_tokens_are_packed_as_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arguments = step(rng, int(rng.integers(1, 20)), int(rng.integers(0, 40)))
    equal(ragged.pack_tokens(*arguments), reference.pack_tokens(*arguments))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize("seed", range(30))
def test_rows_are_joined_as_defined(seed: int, kind: type[np.generic]) -> None:
    rng = np.random.default_rng(seed)
    lanes, width, rows = (int(rng.integers(low, 30)) for low in (1, 1, 0))
    table = integers(rng, -(2**31), 2**31 - 1, lanes, width).view(kind)
    chosen, lens = integers(rng, 0, lanes, rows), integers(rng, 0, width + 1, rows)
    got, expected = ragged.gather(table, chosen, lens), reference.gather(table, chosen, lens)
    equal((got[0], got[1].view(np.int32)), (expected[0], expected[1].view(np.int32)))
    assert got[1].dtype == kind


@pytest.mark.parametrize("seed", range(30))
def test_numbers_are_appended_as_defined(seed: int) -> None:
    """A row that is named twice gets two."""
    rng = np.random.default_rng(seed)
    lanes, rows = int(rng.integers(1, 20)), int(rng.integers(0, 10))
    table, lens = integers(rng, 0, 100, lanes, 40), integers(rng, 0, 30, lanes)
    chosen, values = integers(rng, 0, lanes, rows), integers(rng, 0, 100, rows)
    expected, longer = table.copy(), lens.copy()
    reference.append(expected, longer, chosen, values)
    ragged.append(table, lens, chosen, values)
    equal((table, lens), (expected, longer))


def refused(function: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lanes", int32([0, 3]), r"lanes\[1\] = 3 is outside the rows of the table"),
        ("lanes", int32([-1, 0]), r"lanes\[0\] = -1 is outside"),
        ("lanes", int32([[0, 1]]), "lanes must be one-dimensional"),
        ("lanes", np.array([0, 1]), "lanes must be int32, not int64"),
        ("lanes", int32([0, 0, 1, 1])[::2], "lanes must be contiguous"),
        ("starts", int32([0, -1]), r"starts\[1\] must be in \[0, end\]"),
        ("starts", int32([5, 0]), r"starts\[0\] must be in"),
        ("starts", int32([0]), "starts must be 2 long, not 1"),
        ("ends", int32([4, 9]), r"ends\[1\] = 9 is outside"),
        ("ends", int32([-1, 4]), r"ends\[0\] = -1 is outside"),
        ("tokens", int32(range(8)), r"tokens must be \[rows, size\]"),
        ("tokens", np.zeros((8, 3), np.int32).T, "tokens must be contiguous"),
        ("tokens", np.zeros((2, 8), np.int32), r"lanes\[1\] = 2 is outside"),
        ("blocks", np.zeros((2, 3), np.int32), r"lanes\[1\] = 2 is outside"),
        ("blocks", np.zeros((3, 1), np.int32), r"ends\[0\] = 4 is outside"),
        ("block_size", 0, "block_size must be at least 1"),
    ],
)
def test_a_step_that_is_not_in_the_tables_is_refused(name: str, value: Any, message: str) -> None:
    arguments = {
        "lanes": int32([0, 2]),
        "starts": int32([0, 3]),
        "ends": int32([4, 8]),
        "tokens": np.zeros((3, 8), np.int32),
        "blocks": np.zeros((3, 3), np.int32),
        "block_size": 3,
    }
    ragged.pack_tokens(*arguments.values())
    refused(ragged.pack_tokens, arguments | {name: value}, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("table", np.zeros((3, 4), np.int64), "table must be int32 or float32, not int64"),
        ("table", np.zeros((4, 3), np.float32).T, "table must be contiguous"),
        ("rows", int32([0, 3]), r"rows\[1\] = 3 is outside"),
        ("lens", int32([5, 0]), r"lens\[0\] = 5 is outside"),
        ("lens", int32([0, -1]), r"lens\[1\] = -1 is outside"),
        ("lens", int32([1]), "lens must be 2 long"),
    ],
)
def test_rows_that_are_not_in_the_table_are_refused(name: str, value: Any, message: str) -> None:
    arguments = {"table": np.zeros((3, 4), np.float32), "rows": int32([0, 2]), "lens": int32([4, 0])}
    ragged.gather(*arguments.values())
    refused(ragged.gather, arguments | {name: value}, message)


def test_more_than_offsets_can_say_is_refused() -> None:
    table, count = np.zeros((1, 2**16), np.int32), 2**15
    with pytest.raises(ValueError, match="more than 2147483647"):
        ragged.gather(table, np.zeros(count, np.int32), np.full(count, 2**16, np.int32))


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("table", np.zeros((3, 4), np.float32), "table must be int32, not float32"),
        ("table", frozen(np.zeros((3, 4), np.int32)), "table must be writeable"),
        ("lens", frozen(np.zeros(3, np.int32)), "lens must be writeable"),
        ("lens", int32([0, 0]), "lens must be 3 long"),
        ("lens", int32([0, 0, 4]), "row 2 has no room"),
        ("lens", int32([0, 0, -1]), "row 2 has no room"),
        ("rows", int32([0, 3]), r"rows\[1\] = 3 is outside"),
        ("values", int32([1]), "values must be 2 long"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(name: str, value: Any, message: str) -> None:
    arguments = {
        "table": np.zeros((3, 4), np.int32), "lens": int32([0, 0, 0]), "rows": int32([0, 2]), "values": int32([1, 1])
    }  # fmt: skip
    changed = arguments | {name: value}
    before = changed["lens"].copy()
    refused(ragged.append, changed, message)
    np.testing.assert_array_equal(changed["lens"], before)

"""The native row kernels against their definitions, on every instruction set."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import _C, rows
from millrace.kernels.reference import rows as reference

Float32 = NDArray[np.float32]

SIZES = (1, 7, 16, 17, 31, 33, 63, 65, 129, 2048, 8192)
ISAS = [isa for isa in _C.available_isas() if isa != "baseline"]
ULP = float(np.finfo(np.float32).eps)
GUARD = 64  # poisoned numbers around every output, which must stay


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    return str(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(rng: np.random.Generator, *shape: int) -> Float32:
    return rng.standard_normal(shape).astype(np.float32)


class Guarded:
    """An array of NaN at an odd address inside poison."""

    def __init__(self, *shape: int):
        self.all = np.full(int(np.prod(shape)) + 2 * GUARD + 1, np.nan, np.float32)
        self.edges = (self.all[: GUARD + 1], self.all[self.all.size - GUARD :])
        for edge in self.edges:
            edge[:] = -12345
        self.array = self.all[GUARD + 1 : self.all.size - GUARD].reshape(shape)

    def holding(self, values: Float32) -> Float32:
        self.array[:] = values
        return self.array

    def check(self) -> Float32:
        assert all((edge == -12345).all() for edge in self.edges), "written outside"
        return self.array


def every_isa(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ISAS:
        monkeypatch.setenv("MILLRACE_ISA", name)
        yield name


def in_place(x: Float32, kernel: Callable[..., Any], *args: Any) -> Float32:
    guarded = Guarded(*x.shape)
    kernel(guarded.holding(x), *args)
    return guarded.check()


def norms(size: int, rng: np.random.Generator) -> list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    weight, bias = normal(rng, size), normal(rng, size)
    return [
        (rows.rms_norm, reference.rms_norm, (weight, 1e-6)),
        (rows.layer_norm, reference.layer_norm, (weight, bias, 1e-6)),
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1, 1e-30, 1e-42, 1e15])
def test_norms_are_their_definitions(isa: str, size: int, scale: float, rng: np.random.Generator) -> None:
    x = (normal(rng, 3, size) * scale).astype(np.float32)
    for kernel, definition, args in norms(size, rng):
        guarded = Guarded(*x.shape)
        kernel(x, *args, guarded.array)
        out, expected = guarded.check(), definition(x, *args)
        np.testing.assert_allclose(out, expected, rtol=0, atol=6 * ULP * max(np.abs(expected).max(), 1e-30))
        np.testing.assert_array_equal(kernel(x, *args), out)
        same = Guarded(*x.shape)
        kernel(same.holding(x), *args, same.array)
        np.testing.assert_array_equal(same.check(), out)


@pytest.mark.parametrize("size", SIZES)
def test_embeddings_add_and_mean(isa: str, size: int, rng: np.random.Generator) -> None:
    ids = np.array([4, 0, 4, 2], np.int32)
    tables = {
        "float32": normal(rng, 5, size),
        "float16": normal(rng, 5, size).astype(np.float16).view(np.uint16),
        "bfloat16": (normal(rng, 5, size).view(np.uint32) >> 16).astype(np.uint16),
    }
    for stored, table in tables.items():
        expected = reference.widened(table, stored)[ids].astype(np.float32)
        guarded = Guarded(4, size)
        rows.embed_rows(table, stored, ids, guarded.array)
        np.testing.assert_array_equal(guarded.check(), expected)
        more = normal(rng, 4, size)
        rows.embed_rows(table, stored, ids, guarded.holding(more), accumulate=True)
        np.testing.assert_array_equal(guarded.check(), more + expected)
        rows.add_rows(more, guarded.array)
        np.testing.assert_array_equal(guarded.check(), more + expected + more)
    x, guarded = normal(rng, 37, size), Guarded(1, size)
    rows.mean_rows(x, guarded.array)
    np.testing.assert_allclose(guarded.check(), reference.mean_rows(x), rtol=0, atol=4 * ULP)
    in_order = x[0].copy()
    for row in x[1:]:
        in_order += row
    np.testing.assert_array_equal(guarded.check()[0], in_order / np.float32(37))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_every_stored_number_is_read(isa: str, stored: str) -> None:
    """Denormals, infinities and NaN among them."""
    table = np.arange(65_536, dtype=np.uint16)[None]
    out = np.empty((1, 65_536), np.float32)
    rows.embed_rows(table, stored, np.zeros(1, np.int32), out)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out, reference.widened(table, stored).astype(np.float32))
    assert np.signbit(out[0, 0x8000])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1, 1e-30, 1e-42, 1e30])
def test_normalize(isa: str, size: int, scale: float, rng: np.random.Generator) -> None:
    x = (normal(rng, 3, size) * scale).astype(np.float32)
    x[1] = 0
    out, expected = in_place(x, rows.normalize), reference.normalize(x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=4 * ULP * np.abs(expected).max())
    assert not out[1].any()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dim", [2, 14, 32, 34, 62, 64, 66, 128, 258])
def test_rotation(isa: str, heads: int, dim: int, rng: np.random.Generator) -> None:
    x, frequencies = normal(rng, 5, heads * dim), rng.random(dim // 2, dtype=np.float32)
    cosine, sine = rows.rotary_turns(np.arange(5, dtype=np.int32) * 77, frequencies)
    out = in_place(x, rows.rotate, dim, cosine, sine)
    np.testing.assert_allclose(out, reference.rotate(x, dim, cosine, sine), rtol=0, atol=8 * ULP)
    first, second = np.split(x.reshape(5, heads, dim), 2, -1)
    c, s = cosine[:, None], sine[:, None]
    plain = np.concatenate((first * c - second * s, second * c + first * s), -1)  # each product and sum rounded
    np.testing.assert_array_equal(out.reshape(plain.shape), plain)


def ulps(out: Float32, exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors in units of the last place of the exact values, but at least of the smallest normal number."""
    spacing = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return np.asarray(np.abs(out - exact) / spacing)


@pytest.mark.parametrize("first", [0, 2_000, 131_000, (1 << 20) - 500, (1 << 24) - 511])
def test_turns_are_exact_to_a_unit_in_the_last_place(first: int) -> None:
    positions = np.arange(first, first + 512, dtype=np.int32)
    for theta in (10_000.0, 500_000.0):
        frequencies = (theta ** -(np.arange(31) / 31)).astype(np.float32)
        for factor in (1.0, 1.25):
            turns = rows.rotary_turns(positions, frequencies, factor)
            for out, exact in zip(turns, reference.rotary_turns(positions, frequencies, factor), strict=True):
                assert ulps(out, exact).max() < (0.51 if factor == 1 else 1.26)

"""The native row kernels against their definitions, on every instruction set."""

from collections.abc import Callable
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


def arguments(rng: np.random.Generator) -> Float32:
    """Every size of number where something happens, and none is special."""
    dense = np.linspace(-100, 100, 100_001)
    spread = np.concatenate([sign * 10 ** rng.uniform(-45, 38, 20_000) for sign in (1, -1)])
    return np.concatenate((dense, rng.standard_normal(50_000) * 4, spread)).astype(np.float32)[None]


# Up to here, the relative error, which is at least that of rounding numbers below the normal range.
BOUNDS: dict[str, list[tuple[float, float]]] = {
    "silu": [(-87, 2 * ULP)],
    "gelu": [(-3, 6e-7), (-13, 5e-6)],
    "gelu_tanh": [(-1, 2.5e-7), (-10, 1.3e-5)],
    "relu": [(-np.inf, 0)],
    "none": [(-np.inf, 0)],
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_activations(isa: str, kind: str, rng: np.random.Generator) -> None:
    x = arguments(rng)
    with np.errstate(over="ignore"):
        expected = reference.ACTIVATIONS[kind](x)
    guarded = Guarded(*x.shape)
    rows.activate(x, kind, guarded.array)
    out = guarded.check()
    error = np.abs(out - expected)
    for lowest, relative in BOUNDS[kind]:
        inside = x >= lowest
        assert (error <= relative * np.abs(expected) + 1e-45)[inside].all(), (
            kind,
            lowest,
            x[inside][error[inside].argmax()],
        )
    assert error[x < BOUNDS[kind][-1][0]].max(initial=0) < 1.5e-36
    same = Guarded(*x.shape)
    rows.activate(same.holding(x), kind, same.array)
    np.testing.assert_array_equal(same.check(), out)


@pytest.mark.parametrize("kind", BOUNDS)
def test_activations_at_the_ends(isa: str, kind: str) -> None:
    x = np.array([[0, -0.0, 1e4, -1e4, 3e38, -3e38, np.inf, -np.inf, np.nan, 88, 1e-45]], np.float32)
    y = x if kind == "none" else np.array([[0, 0, 1e4, 0, 3e38, 0, np.inf, 0, np.nan, 88, 0]], np.float32)
    np.testing.assert_allclose(rows.activate(x, kind), y, rtol=ULP, atol=2e-45)


def test_exp(isa: str, rng: np.random.Generator) -> None:
    x = arguments(rng)
    out = rows.exp(x)
    inside = (x >= -87) & (x <= 88.7)
    assert ulps(out[inside], np.exp(x[inside].astype(np.float64))).max() < 1.01
    assert not out[x < -87].any()
    assert np.isposinf(out[x > 88.73]).all()
    ends = np.array([[0, -0.0, np.inf, -np.inf, np.nan, -87.1, 1e4, -1e4]], np.float32)
    np.testing.assert_array_equal(rows.exp(ends), np.array([[1, 1, np.inf, 0, np.nan, 0, np.inf, 0]], np.float32))


def everything(size: int, rng: np.random.Generator) -> list[Float32]:
    x, weight, bias = normal(rng, 3, size) * 3, normal(rng, size), normal(rng, size)
    unit, mean = x.copy(), rows.mean_rows(x)
    rows.normalize(unit)
    norm = [rows.rms_norm(x, weight, 1e-6), rows.layer_norm(x, weight, bias, 1e-6)]
    return [*norm, unit, mean, rows.exp(x), *(rows.activate(x, kind) for kind in BOUNDS)]


@pytest.mark.parametrize("size", [*SIZES, 100_001])
def test_every_instruction_set_gives_the_same_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for isa in ISAS:
        monkeypatch.setenv("MILLRACE_ISA", isa)
        results.append([out.tobytes() for out in everything(size, np.random.default_rng(size))])
    assert all(result == results[0] for result in results)


def test_a_row_does_not_depend_on_its_neighbours_or_place(isa: str, rng: np.random.Generator) -> None:
    x, weight, bias = normal(rng, 9, 129), normal(rng, 129), normal(rng, 129)
    together = rows.rms_norm(x, weight, 1e-6), rows.layer_norm(x, weight, bias, 1e-6)
    for row in range(len(x)):  # at addresses of every alignment
        alone = rows.rms_norm(x[row : row + 1], weight, 1e-6), rows.layer_norm(x[row : row + 1], weight, bias, 1e-6)
        for one, all_rows in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[0], all_rows[row])


def test_layer_norm_far_from_zero(isa: str, rng: np.random.Generator) -> None:
    """A rounded mean costs as much as the input's own rounding, not its square."""
    x = normal(rng, 2, 768) + 1000
    one, none = np.ones(768, np.float32), np.zeros(768, np.float32)
    expected = reference.layer_norm(x, one, none, 1e-6)
    np.testing.assert_allclose(rows.layer_norm(x, one, none, 1e-6), expected, rtol=0, atol=2 * ULP * 1000)


def test_no_rows_and_zeros(isa: str) -> None:
    weight, table = np.ones(3, np.float32), np.ones((1, 3), np.float32)
    none = np.empty((0, 3), np.float32)
    assert rows.rms_norm(none, weight, 1e-6).shape == rows.layer_norm(none, weight, weight, 1e-6).shape == (0, 3)
    rows.normalize(none)
    rows.add_rows(none, none)
    rows.embed_rows(table, "float32", np.empty(0, np.int32), none)
    rows.rotate(np.empty((0, 8), np.float32), 4, *rows.rotary_turns(np.empty(0, np.int32), np.ones(2, np.float32)))
    zeros = np.zeros((2, 3), np.float32)
    assert not rows.rms_norm(zeros, weight, 1e-6).any()
    np.testing.assert_array_equal(rows.layer_norm(zeros, weight, weight, 1e-6), np.ones((2, 3)))


def single(*shape: int) -> Float32:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows.rms_norm(np.ones((2, 3)), single(3), 1e-6), "x must be float32, not float64"),
        (lambda: rows.rms_norm(single(3), single(3), 1e-6), r"x must be \[rows, size\]"),
        (lambda: rows.rms_norm(single(2, 0), single(0), 1e-6), "size at least 1"),
        (lambda: rows.rms_norm(single(3, 2).T, single(3), 1e-6), "x must be contiguous"),
        (lambda: rows.rms_norm(single(2, 3), single(4), 1e-6), "weight must be 3 long, not 4"),
        (lambda: rows.rms_norm(single(2, 3), single(3), 0), "eps must be above 0"),
        (lambda: rows.rms_norm(single(2, 3), single(3), 1e-6, single(3, 2)), r"out must be \[2, 3\]"),
        (lambda: rows.layer_norm(single(2, 3), single(3), single(2), 1e-6), "bias must be 3 long"),
        (lambda: rows.rotary_turns(np.array([-1], np.int32), single(2)), r"positions\[0\] = -1 is outside"),
        (lambda: rows.rotary_turns(np.array([(1 << 24) + 1], np.int32), single(2)), "is outside"),
        (lambda: rows.rotary_turns(np.array([1], np.int32), single(2) * 2), "frequencies.* is outside"),
        (lambda: rows.rotate(single(1, 6), 4, single(1, 2), single(1, 2)), "x must be"),
        (lambda: rows.rotate(single(1, 8), 4, single(1, 3), single(1, 3)), "x must be"),
        (lambda: rows.rotate(single(2, 8), 4, single(1, 2), single(1, 2)), "x must be"),
        (lambda: rows.embed_rows(single(2, 3), "float32", np.array([2], np.int32), single(1, 3)), r"ids\[0\] = 2"),
        (lambda: rows.embed_rows(single(2, 3), "bfloat16", np.array([1], np.int32), single(1, 3)), "must be uint16"),
        (
            lambda: rows.embed_rows(single(2, 3), "int8", np.array([1], np.int32), single(1, 3)),
            "stored must be one of .* not int8",
        ),
        (lambda: rows.add_rows(single(2, 3), single(1, 3)), "out must be"),
        (lambda: rows.mean_rows(np.empty((0, 3), np.float32), single(1, 3)), "no mean of none"),
        (lambda: rows.normalize(np.broadcast_to(single(1, 3), (1, 3))), "x must be writeable"),
        (
            lambda: rows.activate(single(1, 3), "swish"),
            "kind must be one of none, silu, .* not swish",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_baseline_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_ISA", "baseline")
    with pytest.raises(ValueError, match="need AVX2"):
        rows.normalize(single(1, 3))

"""Products with bf16 weights against their definition, on every instruction set."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import _C
from millrace.kernels.matmul import matmul, pack
from millrace.kernels.reference import matmul as reference
from millrace.kernels.reference.rows import widened

Array = NDArray[Any]

# Awkward on purpose: below, at and beyond tiles of channels, chunks of k, and rows that stay in registers.
SHAPES = [(1, 1, 1), (2, 31, 33), (3, 33, 17), (7, 17, 129), (12, 32, 64), (13, 65, 31), (31, 129, 7), (33, 96, 257)]
ISAS = [isa for isa in _C.available_isas() if isa != "baseline"]
ISAS += ["amx_emulated"] if "avx512_bf16" in ISAS else []
HALF_ULP = 2.0**-8  # of bf16, relative


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    return str(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def bound(x: Array, weight: Array) -> Array:
    """How far a sum in float32 may be from the exact one: a rounding for each term, each of the size of the whole."""
    sizes = reference.sums_bf16(np.abs(x), np.abs(weight))
    return np.asarray(np.float64(2.0**-24) * (x.shape[1] + 2) * sizes + 1e-36)


def poisoned(shape: tuple[int, int], dtype: type[Any]) -> tuple[Array, Array]:
    """An array inside a larger one of NaN or of all bits set, and the larger one."""
    whole = np.full((shape[0] + 2, shape[1] + 37), np.nan if dtype == np.float32 else 0xFFFF, dtype)
    return whole[1:-1, 5 : 5 + shape[1]], whole


def is_poison(whole: Array) -> Array:
    return np.isnan(whole) if whole.dtype == np.float32 else whole == 0xFFFF


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (5, 64, 2048), (3, 32, 8192)])
def test_products_are_their_definition(isa: str, m: int, n: int, k: int, rng: np.random.Generator) -> None:
    x, weight = normal(rng, m, k), normal(rng, n, k)
    out, whole = poisoned((m, n), np.float32)
    matmul(x, pack(weight, "bf16"), out=out)
    assert (np.abs(out - reference.sums_bf16(x, weight)) <= bound(x, weight)).all()
    out[:] = np.nan
    assert is_poison(whole).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("epilogue", ["store", "add", "activate", "gate"])
def test_every_epilogue(isa: str, epilogue: Any, activation: Any, biased: bool, rng: np.random.Generator) -> None:
    for m, n, k in SHAPES:
        n = -(-n // 32) * 32 if epilogue == "gate" else n
        x, weight = normal(rng, m, k), normal(rng, n, k) * np.float32(k**-0.5)
        bias = normal(rng, n) if biased else None
        half = epilogue in ("activate", "gate")
        out, whole = poisoned((m, n // 2 if epilogue == "gate" else n), np.uint16 if half else np.float32)
        before = normal(rng, m, n)
        if epilogue == "add":
            out[:] = before
        matmul(x, pack(weight, "bf16"), bias, epilogue, activation, out)
        sums = reference.sums_bf16(x, weight)
        expected = reference.finish(sums, bias, epilogue, activation, before)
        slack = bound(x, weight) + (2.0**-23 * (np.abs(sums) + np.abs(before) + 10))
        if half:  # the slope of an activation is below 1.13, and a factor of a gate multiplies the other's slack
            both = slack.reshape(m, -1, 2, 16).max(2).reshape(m, -1) if epilogue == "gate" else slack
            size = np.abs(sums).max() + np.abs(bias).max() if bias is not None else np.abs(sums).max()
            slack = 2 * both * (1 + (size if epilogue == "gate" else 0)) + HALF_ULP * np.abs(expected)
            assert (np.abs(widened(out, "bfloat16") - expected) <= slack).all()
        else:
            assert (np.abs(out - expected) <= slack).all()
        out[:] = whole[0, 0]
        assert is_poison(whole).all()


def test_channels_that_fill_up_a_gate_give_zeros(isa: str, rng: np.random.Generator) -> None:
    weight = normal(rng, 64, 40) / 6
    weight[45:48] = weight[61:64] = 0
    out = matmul(normal(rng, 5, 40), pack(weight, "bf16"), epilogue="gate", activation="silu")
    assert (out[:, 29:] == 0).all()
    assert (out[:, :29] != 0).all()


@pytest.mark.parametrize("k", [31, 64, 2049])
@pytest.mark.parametrize("epilogue", ["store", "gate"])
def test_a_row_does_not_depend_on_how_work_is_divided(
    isa: str, epilogue: Any, k: int, rng: np.random.Generator
) -> None:
    m, n = 33, 96
    x, weights, bias = normal(rng, m, k), pack(normal(rng, n, k), "bf16"), normal(rng, n)
    whole = matmul(x, weights, bias, epilogue, "silu")
    for rows in [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17, 24, 25, 32]:
        np.testing.assert_array_equal(matmul(x[:rows], weights, bias, epilogue, "silu"), whole[:rows])
    columns = 32 if epilogue == "store" else 16
    out = np.zeros_like(whole)
    for first, last in [(0, 1), (1, 8), (8, 33)]:
        for block in range(weights.blocks):
            before = out.copy()
            matmul(x, weights, bias, epilogue, "silu", out, rows=(first, last), blocks=(block, block + 1))
            written = (slice(first, last), slice(block * columns, (block + 1) * columns))
            np.testing.assert_array_equal(out[written], whole[written])
            before[written] = out[written]
            np.testing.assert_array_equal(out, before)
    np.testing.assert_array_equal(out, whole)


def test_activations_may_be_bf16_already(isa: str, rng: np.random.Generator) -> None:
    for m, n, k in SHAPES:
        x, weights = normal(rng, m, k), pack(normal(rng, n, k), "bf16")
        np.testing.assert_array_equal(matmul(reference.to_bf16(x), weights), matmul(x, weights))


def test_rows_of_any_stride(isa: str, rng: np.random.Generator) -> None:
    x, weights = normal(rng, 14, 50), pack(normal(rng, 40, 50), "bf16")
    out = np.zeros((14, 80), np.float32)
    matmul(x[::-2], weights, out=out[::2, :40])
    np.testing.assert_array_equal(out[::2, :40], matmul(x[::-2].copy(), weights))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 33), (33, 31), (64, 64), (129, 7)])
def test_weights_come_back_rounded(dtype: type[Any], n: int, k: int, rng: np.random.Generator) -> None:
    weight = normal(rng, n, k)
    weight[0, 0] = 2.0**-26  # subnormal in float16
    stored = reference.to_bf16(weight) if dtype == np.uint16 else weight.astype(dtype)
    values = widened(stored, "bfloat16" if dtype == np.uint16 else "float32")
    np.testing.assert_array_equal(pack(stored, "bf16").unpack(), reference.rounded(values))
    np.testing.assert_array_equal(pack(stored[::-1], "bf16").unpack(), reference.rounded(values)[::-1])


def test_every_float16_is_read(rng: np.random.Generator) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = np.where(np.isfinite(halves), halves, np.float16(0)).reshape(64, -1)
    np.testing.assert_array_equal(pack(halves, "bf16").unpack(), reference.rounded(halves))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_weights_that_are_no_numbers_are_refused(bad: float, dtype: type[Any], rng: np.random.Generator) -> None:
    with np.errstate(over="ignore"):
        for n, k in [(0, 0), (33, 40), (69, 16)]:
            weight = normal(rng, 70, 41)
            weight[n, k] = bad
            stored = reference.to_bf16(weight) if dtype == np.uint16 else weight.astype(dtype)
            with pytest.raises(ValueError, match=rf"weight\[{n // 32 * 32}:"):
                pack(stored, "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 6), np.float32)}, "x must have 5 columns, not 6"),
        ({"x": np.zeros((2, 5))}, "x must be float32"),
        ({"x": np.zeros((2, 5), np.float16)}, "x must be float32 or uint16"),
        ({"x": np.zeros(5, np.float32)}, "x must have two dimensions"),
        ({"x": np.zeros((2, 10), np.float32)[:, ::2]}, "x must have contiguous"),
        ({"bias": np.zeros(39, np.float32)}, "bias must be 40 long"),
        ({"bias": np.zeros(40)}, "bias must be float32"),
        ({"epilogue": "stor"}, "epilogue must be one of store, add, activate, gate, not stor"),
        ({"activation": "tanh"}, "activation must be one of none, silu"),
        ({"out": np.zeros((2, 39), np.float32)}, r"out must have the shape \(2, 40\)"),
        ({"out": np.zeros((2, 40), np.uint16)}, "out must be float32"),
        ({"out": np.zeros((2, 40), np.float32), "epilogue": "activate"}, "out must be uint16"),
        ({"out": np.frombuffer(bytes(320), np.float32).reshape(2, 40)}, "writeable"),
        ({"epilogue": "add"}, "add needs out"),
        ({"epilogue": "gate"}, "multiple of 32"),
        ({"rows": (0, 3)}, r"rows must be a range within \(0, 2\)"),
        ({"rows": (1, 0)}, "rows must be a range"),
        ({"blocks": (-1, 1)}, r"blocks must be a range within \(0, 2\)"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": np.zeros((2, 5), np.float32), "weights": pack(np.zeros((40, 5), np.float32), "bf16")}
    with pytest.raises(ValueError, match=message):
        matmul(**(arguments | change))


@pytest.mark.parametrize(
    ("weight", "width", "group", "message"),
    [
        (np.zeros((0, 5), np.float32), "bf16", 0, "at least 1 output channel"),
        (np.zeros((5, 0), np.float32), "bf16", 0, "1 to 65536 input channels"),
        (np.zeros((1, 65_537), np.float32), "bf16", 0, "1 to 65536 input channels"),
        (np.zeros((5, 5)), "bf16", 0, "weight must be float32, float16 or uint16"),
        (np.zeros(5, np.float32), "bf16", 0, "two dimensions"),
        (np.zeros((5, 5), np.float32), "bf17", 0, "width must be one of bf16, int8, int4, not bf17"),
        (np.zeros((5, 5), np.float32), "bf16", 32, "group must be 0"),
        (np.zeros((5, 5), np.float32), "int8", 128, "group must be 0"),
        (np.zeros((5, 5), np.float32), "int4", 64, "32 or 128 long, not 64"),
    ],
)
def test_bad_weights_are_named(weight: Array, width: Any, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(weight, width, group)


def test_a_processor_without_avx2_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = pack(np.ones((4, 4), np.float32), "bf16")
    monkeypatch.setenv("MILLRACE_ISA", "baseline")
    with pytest.raises(ValueError, match="AVX2"):
        matmul(np.ones((1, 4), np.float32), weights)

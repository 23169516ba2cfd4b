"""Products with int8 and int4 weights, bit for bit on every instruction set."""

from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import _C
from millrace.kernels.matmul import Activation, Epilogue, PackedWeights, Width, matmul, pack
from millrace.kernels.reference.matmul_int import encode, matmul_int
from millrace.kernels.reference.quantization import Quantized, round_to_bf16

Array = NDArray[Any]

KINDS: list[tuple[Width, int]] = [("int8", 0), ("int4", 32), ("int4", 128)]
kinds = pytest.mark.parametrize(("width", "group"), KINDS)
POISON = np.float32(np.nan)


@pytest.fixture(params=[isa for isa in _C.available_isas() if isa != "baseline"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    return str(request.param)


def exact_weights(rng: np.random.Generator, n: int, k: int, width: Width, group: int) -> Quantized:
    """Weights that integers hold without error: a scale of bf16 times codes that reach both ends of their range."""
    size = group or k
    groups = -(-k // size)
    most = 15 if group else 127
    zeros = rng.integers(0, 16, (n, groups)) if group else np.zeros((n, groups), np.int64)
    exponents = rng.integers(-16, -10, (n, 1)) + rng.integers(0, 2, (n, groups))  # alike: sums of 64 are exact
    scales = np.ldexp(rng.integers(128, 256, (n, groups)), exponents).astype(np.float32)
    point = np.repeat(zeros, size, axis=1)[:, :k]
    codes = rng.integers(0 if group else -127, most + 1, (n, k)) - point
    for first in range(0, k, size):  # a lone number stands for the upper end
        lone = first + 1 == k
        zeros[:, first // size] = 0 if lone else zeros[:, first // size]
        codes[:, first] = most - zeros[:, first // size]
        if not lone:
            codes[:, first + 1] = -zeros[:, first // size] if group else 1
    return Quantized(codes.astype(np.int32), scales, zeros.astype(np.int32), size)


def packed_pair(rng: np.random.Generator, n: int, k: int, width: Width, group: int) -> tuple[PackedWeights, Quantized]:
    """Packed weights, and the same as the definition takes them."""
    weights = exact_weights(rng, n, k, width, group)
    packed = pack(weights.values(), width, group)
    if width == "int4":
        assert np.array_equal(packed.unpack(), weights.values())
        return packed, weights
    # The scale of int8 may be a little off: least squares.
    assert np.allclose(packed.scales, weights.scales, rtol=1e-6, atol=0)
    stored = Quantized(weights.codes, packed.scales, weights.zeros, weights.group)
    assert np.array_equal(packed.unpack(), stored.values())
    return packed, stored


def activations(rng: np.random.Generator, m: int, k: int) -> NDArray[np.float32]:
    return (rng.standard_normal((m, k)) * rng.uniform(0.01, 30, (m, 1))).astype(np.float32)


SHAPES = [
    (1, 1, 1), (2, 31, 7), (3, 33, 17), (4, 32, 31), (5, 64, 33), (6, 17, 63), (7, 96, 64), (8, 33, 65), (9, 40, 127),
    (17, 129, 128), (13, 32, 129), (1, 70, 191), (31, 33, 192), (33, 65, 257), (2, 48, 1023),
]  # fmt: skip


@kinds
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product_is_the_definition_bit_for_bit(isa: str, width: Width, group: int, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng([m, n, k])
    packed, weights = packed_pair(rng, n, k, width, group)
    x = activations(rng, m, k)
    out = np.full((m, n), POISON)
    matmul(x, packed, out=out)
    expected = matmul_int(x, weights)
    if width == "int8" and k == 1:
        assert np.allclose(out, expected, rtol=1e-6)
    else:
        assert np.array_equal(out, expected)


@kinds
def test_bf16_activations_are_met_as_their_values(isa: str, width: Width, group: int) -> None:
    rng = np.random.default_rng(1)
    packed, _ = packed_pair(rng, 33, 129, width, group)
    x = round_to_bf16(activations(rng, 5, 129))
    half = (x.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(matmul(half, packed), matmul(x, packed))


@kinds
def test_extremes_do_not_overflow(isa: str, width: Width, group: int) -> None:
    """The largest sums there are: all codes and all activations at the end of their range, of either sign."""
    k = 65_536
    codes = np.full((2, k), 15 if group else 127, np.int32)
    codes[1] *= -1
    size = group or k
    weights = Quantized(codes, np.full((2, k // size), 129 / 256, np.float32), np.zeros((2, k // size), np.int32), size)
    x = np.full((2, k), 127, np.float32)
    x[1] *= -1
    expected = matmul_int(x, weights)
    out = matmul(x, pack(weights.values(), width, group))
    assert np.array_equal(out, expected) if group else np.allclose(out, expected, rtol=1e-6)


def finish(sums: Array, epilogue: Epilogue, activation: Activation, out: Array) -> Array:
    def activate(y: Array) -> Array:
        y = y.astype(np.float64)
        return np.asarray(y * np.exp(-np.logaddexp(0, -y)) if activation == "silu" else np.maximum(y, 0))

    if epilogue == "gate":
        blocks = sums.reshape(len(sums), -1, 2, 16)
        return (activate(blocks[:, :, 0]) * blocks[:, :, 1]).reshape(len(sums), -1)
    return {"store": sums, "add": sums + out, "activate": activate(sums)}[epilogue]


@kinds
@pytest.mark.parametrize("epilogue", get_args(Epilogue))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n", [32, 96, 49])
def test_epilogues(isa: str, width: Width, group: int, epilogue: Epilogue, with_bias: bool, n: int) -> None:
    if epilogue == "gate" and n % 32 != 0:
        n += 32 - n % 32
    rng = np.random.default_rng(n)
    packed, weights = packed_pair(rng, n, 100, width, group)
    x = activations(rng, 11, 100)
    bias = rng.standard_normal(n).astype(np.float32) if with_bias else None
    sums = matmul_int(x, weights)
    if bias is not None:
        sums = sums + bias
    before = rng.standard_normal((11, n)).astype(np.float32)
    activation: Activation = "silu" if epilogue == "gate" else "relu"
    columns = n // 2 if epilogue == "gate" else n
    half = epilogue in ("activate", "gate")
    wide = np.full((11, columns + 5), 0x7FC0, np.uint16) if half else np.full((11, columns + 5), POISON)
    out = wide[:, :columns]
    if epilogue == "add":
        out[:] = before
    matmul(x, packed, bias=bias, epilogue=epilogue, activation=activation, out=out)
    expected = finish(sums, epilogue, activation, before)
    if half:
        value = (out.astype(np.uint32) << 16).view(np.float32)
        assert np.allclose(value, expected, rtol=2**-8, atol=1e-6)
        assert (wide[:, columns:] == 0x7FC0).all()
    else:
        assert np.array_equal(out, expected)
        assert np.isnan(wide[:, columns:]).all()


@kinds
def test_a_result_depends_neither_on_other_rows_nor_on_ranges(isa: str, width: Width, group: int) -> None:
    rng = np.random.default_rng(3)
    packed = pack(rng.standard_normal((161, 333)).astype(np.float32), width, group)
    x = activations(rng, 37, 333)
    whole = matmul(x, packed)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 36):
        assert np.array_equal(matmul(x[:m], packed), whole[:m])
        assert np.array_equal(matmul(x[37 - m :], packed), whole[37 - m :])
    for row, block in ((1, 1), (20, 3), (36, 5)):
        out = np.full_like(whole, POISON)
        for rows in ((0, row), (row, 37)):
            for blocks in ((0, block), (block, packed.blocks)):
                matmul(x, packed, out=out, rows=rows, blocks=blocks)
        assert np.array_equal(out, whole)
    out = np.full_like(whole, POISON)
    matmul(x, packed, out=out, rows=(5, 7), blocks=(1, 2))
    untouched = np.ones_like(out, bool)
    untouched[5:7, 32:64] = False
    assert np.isnan(out[untouched]).all()
    assert np.array_equal(out[~untouched], whole[~untouched])


@kinds
def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch, width: Width, group: int) -> None:
    """Weights packed and products of them, bit for bit."""
    rng = np.random.default_rng(4)
    weight = rng.standard_t(3, (75, 421)).astype(np.float32)
    x = activations(rng, 10, 421)
    results = []
    for isa in _C.available_isas():
        if isa != "baseline":
            monkeypatch.setenv("MILLRACE_ISA", isa)
            packed = pack(weight, width, group)
            results.append((packed.unpack(), matmul(x, packed)))
    for unpacked, product in results[1:]:
        assert np.array_equal(unpacked, results[0][0])
        assert np.array_equal(product, results[0][1])


@kinds
def test_rows_at_the_ends_of_the_range(isa: str, width: Width, group: int) -> None:
    """Null, tiny and huge rows yield numbers; what is not a number stays none, in its row alone."""
    rng = np.random.default_rng(5)
    k = 129
    packed, weights = packed_pair(rng, 33, k, width, group)
    x = activations(rng, 8, k)
    x[0] = 0
    x[1] *= np.float32(1e-32)
    x[2] *= np.float32(1e30)
    x[3, 77] = np.nan
    x[4, 128] = np.inf
    x[5, 0] = -np.inf
    x[6] *= np.float32(1e-44)
    out = matmul(x, packed)
    assert (out[[0, 6]] == 0).all()
    assert np.isfinite(out[[1, 2, 7]]).all()
    assert np.isnan(out[3:6]).all()
    assert np.array_equal(out, matmul_int(x, weights), equal_nan=True)


def test_encoding_rounds_to_nearest_even() -> None:
    numbers, scales = encode(np.array([[127, 0.5, 1.5, -2.5, -126.4]], np.float32))
    assert numbers.tolist() == [[127, 0, 2, -2, -126]]
    assert scales.tolist() == [1.0]

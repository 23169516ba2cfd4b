"""Products on tiles: the emulated instructions everywhere, the real ones where the machine has them.

tests/csrc/test_matmul_tiles.cpp also runs what the compiler made of the real ones.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import _C
from millrace.kernels.matmul import Epilogue, PackedWeights, Width, matmul, pack
from millrace.kernels.reference.tiles import matmul_tiles

Array = NDArray[Any]

pytestmark = pytest.mark.skipif("avx512_bf16" not in _C.available_isas(), reason="tiles are emulated with AVX-512 BF16")

KINDS: list[tuple[Width, int]] = [("bf16", 0), ("int8", 0), ("int4", 32), ("int4", 128)]
INTEGERS = KINDS[1:]
POISON = np.float32(np.nan)


@pytest.fixture(params=["amx_emulated", *({"amx"} & set(_C.available_isas()))])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    assert _C.isa() == request.param
    return str(request.param)


def bf16(x: Array) -> NDArray[np.float32]:
    """Cut to what bf16 holds."""
    return (np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return bf16(rng.standard_normal(shape))


@pytest.mark.parametrize(("m", "n", "k"), [(16, 32, 32), (1, 1, 1), (7, 17, 31), (3, 33, 129), (33, 64, 1100)])
def test_bf16_is_the_definition_bit_for_bit(isa: str, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng([m, n, k])
    x, weights = normal(rng, m, k), normal(rng, n, k)
    assert np.array_equal(matmul(x, pack(weights, "bf16")), matmul_tiles(x, weights))


def test_denormals_are_zeros_as_operands_as_products_and_as_sums(isa: str) -> None:
    rng = np.random.default_rng(2)
    x = bf16(normal(rng, 16, 64) * np.float32(2) ** rng.integers(-75, -50, (16, 64)))
    weights = bf16(normal(rng, 32, 64) * np.float32(2) ** rng.integers(-75, -50, (32, 64)))
    x[3], weights[5] = bf16(np.full(64, 1e-39)), np.float32(2) ** 60
    out = matmul(x, pack(weights, "bf16"))
    assert np.array_equal(out, matmul_tiles(x, weights))
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    assert (out[np.abs(exact) < 1e-39] == 0).all()
    assert (out[3] == 0).all()
    assert out.any()


@pytest.mark.parametrize(("n", "k"), [(33, 129), (160, 2100)])
def test_bf16_is_near_the_exact_product(isa: str, n: int, k: int) -> None:
    rng = np.random.default_rng(k)
    x, weights = normal(rng, 70, k), normal(rng, n, k)
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    assert np.abs(matmul(x, pack(weights, "bf16")) - exact).max() < 1e-6 * k


@pytest.mark.parametrize(("width", "group"), INTEGERS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 31), (129, 65), (64, 1100), (200, 2049)])
def test_integers_are_those_of_avx512(
    isa: str, monkeypatch: pytest.MonkeyPatch, width: Width, group: int, n: int, k: int
) -> None:
    rng = np.random.default_rng([n, k])
    packed = pack(rng.standard_normal((n, k)).astype(np.float32), width, group)
    x = rng.standard_normal((70, k)).astype(np.float32)
    out = {rows: matmul(x[:rows], packed) for rows in (1, 15, 16, 17, 70)}
    monkeypatch.setenv("MILLRACE_ISA", "avx512")
    expected = matmul(x, packed)
    for rows, product in out.items():
        assert np.array_equal(product, expected[:rows])


@pytest.mark.parametrize(("width", "group"), INTEGERS)
def test_the_largest_sums_do_not_overflow(isa: str, monkeypatch: pytest.MonkeyPatch, width: Width, group: int) -> None:
    x = np.repeat(np.array([[1], [-1]], np.float32), 65_536, axis=1)
    packed = pack(x, width, group)
    out = matmul(x, packed)
    monkeypatch.setenv("MILLRACE_ISA", "avx512")
    assert np.array_equal(out, matmul(x, packed))
    assert np.allclose(np.abs(out), 65_536, rtol=2**-8)


@pytest.mark.parametrize(("width", "group"), KINDS)
def test_a_row_is_the_same_in_every_number_of_rows_and_every_split(isa: str, width: Width, group: int) -> None:
    rng = np.random.default_rng(3)
    packed = pack(rng.standard_normal((161, 1100)).astype(np.float32), width, group)
    x = rng.standard_normal((530, 1100)).astype(np.float32)
    whole = matmul(x, packed)
    for rows in (*range(1, 41), 64, 512, 513):
        assert np.array_equal(matmul(x[:rows], packed), whole[:rows])
        assert np.array_equal(matmul(x[-rows:], packed), whole[-rows:])
    for row, block in ((1, 1), (17, 3), (515, 5)):
        out = np.full_like(whole, POISON)
        for rows_range in ((0, row), (row, 530)):
            for blocks in ((0, block), (block, packed.blocks)):
                matmul(x, packed, out=out, rows=rows_range, blocks=blocks)
        assert np.array_equal(out, whole)


def finished(sums: Array, epilogue: Epilogue, before: Array) -> Array:
    if epilogue == "gate":
        blocks = sums.reshape(len(sums), -1, 2, 16)
        return (np.maximum(blocks[:, :, 0], 0) * blocks[:, :, 1]).reshape(len(sums), -1)
    return {"store": sums, "add": before + sums, "activate": np.maximum(sums, 0)}[epilogue]


@pytest.mark.parametrize(("width", "group"), KINDS)
@pytest.mark.parametrize("epilogue", ["store", "add", "activate", "gate"])
@pytest.mark.parametrize("n", [64, 49])
def test_epilogues(isa: str, width: Width, group: int, epilogue: Epilogue, n: int) -> None:
    if epilogue == "gate":
        n = 96
    rng = np.random.default_rng(n)
    packed: PackedWeights = pack(rng.standard_normal((n, 700)).astype(np.float32), width, group)
    x = rng.standard_normal((41, 700)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    before = rng.standard_normal((41, n)).astype(np.float32)
    half = epilogue in ("activate", "gate")
    columns = n // 2 if epilogue == "gate" else n
    wide = np.full((41, columns + 5), 0x7FC0, np.uint16) if half else np.full((41, columns + 5), POISON)
    out = wide[:, :columns]
    if epilogue == "add":
        out[:] = before
    matmul(x, packed, bias=bias, epilogue=epilogue, activation="relu", out=out)
    expected = finished(matmul(x, packed) + bias, epilogue, before)
    if half:
        assert np.allclose((out.astype(np.uint32) << 16).view(np.float32), expected, rtol=2**-8)
        assert (wide[:, columns:] == 0x7FC0).all()
    else:
        assert np.array_equal(out, expected)
        assert np.isnan(wide[:, columns:]).all()


def test_asking_for_amx_where_it_is_not_is_refused_and_kills_nothing() -> None:
    if "amx" in _C.available_isas():
        pytest.skip("this machine has AMX")
    code = "import os; from millrace.kernels import _C; os.environ['MILLRACE_ISA'] = 'amx'; _C.isa()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "this machine has" in result.stderr

"""Scales of integer weights: the native search against its definition, and against round-to-nearest."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import _C
from millrace.kernels.matmul import Width, pack
from millrace.kernels.reference.hadamard import SIGNS, transform, transform_back
from millrace.kernels.reference.quantization import quantize

Array = NDArray[Any]

kinds = pytest.mark.parametrize(("width", "group"), [("int8", 0), ("int4", 32), ("int4", 128)])


@pytest.fixture(params=[isa for isa in _C.available_isas() if isa in ("avx2", "avx512")])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    return str(request.param)


def draw(kind: str, n: int, k: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(k)
    if kind == "normal":
        return rng.standard_normal((n, k)).astype(np.float32)
    if kind == "heavy tails":
        return rng.standard_t(3, (n, k)).astype(np.float32)
    return rng.uniform(0.1, 1, (n, k)).astype(np.float32)


def errors(values: Array, weight: Array, size: int) -> Array:
    """Squared error of each group as products meet it, over its energy."""
    n, k = weight.shape
    values, weight = transform(values), transform(weight)
    padding = ((0, 0), (0, -k % size))
    squares = np.pad((values.astype(np.float64) - weight) ** 2, padding).reshape(n, -1, size).sum(axis=2)
    return np.asarray(squares / np.pad(weight.astype(np.float64) ** 2, padding).reshape(n, -1, size).sum(axis=2))


@kinds
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign"])
@pytest.mark.parametrize("k", [1, 31, 65, 129, 512])
def test_no_worse_than_the_definition_and_than_nearest(isa: str, width: Width, group: int, kind: str, k: int) -> None:
    weight = draw(kind, 45, k)
    size = group or k
    found = errors(pack(weight, width, group).unpack(), weight, size)
    nearest = errors(quantize(weight, group, search=False).values(), weight, size)
    assert (found <= nearest * (1 + 1e-4) + 1e-12).all()
    defined = errors(quantize(weight, group).values(), weight, size)
    assert found.sum() <= defined.sum() * 1.001 + 1e-12


@kinds
def test_search_pays(isa: str, width: Width, group: int) -> None:
    weight = draw("normal", 64, 1024)
    found = ((pack(weight, width, group).unpack() - weight) ** 2).sum()
    nearest = ((quantize(weight, group, search=False).values() - weight) ** 2).sum()
    assert found <= nearest * {0: 1, 32: 0.95, 128: 0.92}[group]


@kinds
def test_groups_without_spread(isa: str, width: Width, group: int) -> None:
    """Equal numbers, zeros, and magnitudes at the ends of float32."""
    weight = np.ones((9, 160), np.float32)
    weight[1] = -3.7
    weight[2] = 0
    weight[3] = 1e-30
    weight[4] = -1e30
    weight[5] = 3e38
    weight[6] = 1e-42
    weight[7] = np.linspace(-1e38, 1e38, 160)
    weight[8] = np.linspace(-1e-30, 1e-30, 160)
    values = pack(weight, width, group).unpack()
    assert np.isfinite(values).all()
    assert (values[[2, 6]] == 0).all()
    assert np.allclose(values[[0, 1, 3, 4, 5]], weight[[0, 1, 3, 4, 5]], rtol=2**-8, atol=0)
    met, given = transform(values[7:]).astype(np.float64), transform(weight[7:])
    steps = 2 * np.abs(given).max(axis=1, keepdims=True) / (15 if group else 254)
    assert (np.abs(met - given) <= 1.5 * steps).all()


@kinds
def test_a_few_large_inputs_cost_the_others_little(isa: str, width: Width, group: int) -> None:
    """What the transform is for: by itself, the largest number of a channel or group sets the step of all."""
    weight = draw("normal", 32, 256)
    weight[:, ::64] *= 60
    lost = pack(weight, width, group).unpack() - weight
    step = np.abs(weight).max(axis=1, keepdims=True) * 2 / (15 if group else 254)
    assert (lost**2).mean() < (step**2 / 12).mean() / 8


def test_transform_is_orthogonal_and_leaves_the_rest() -> None:
    x = draw("normal", 5, 150)
    met = transform(x)
    assert np.array_equal(met[:, 128:], x[:, 128:])
    assert np.allclose(transform_back(met), x, atol=1e-5)
    sylvester = np.array([[1.0]])
    for _ in range(6):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    assert np.allclose(met[:, 64:128], x[:, 64:128] * SIGNS @ sylvester / 8, atol=1e-5)
    assert np.allclose(np.abs(transform(np.ones((1, 64)))), 1)


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(isa: str, width: Width, group: int, bad: float) -> None:
    weight = np.ones((33, 70), np.float32)
    weight[32, 69] = bad
    with pytest.raises(ValueError, match="NaN"):
        pack(weight, width, group)


@kinds
def test_stored_forms_are_met_as_their_values(isa: str, width: Width, group: int) -> None:
    weight = draw("normal", 33, 77)
    halves = weight.astype(np.float16)
    assert np.array_equal(pack(halves, width, group).unpack(), pack(halves.astype(np.float32), width, group).unpack())
    bits = weight.view(np.uint32) & 0xFFFF0000
    assert np.array_equal(
        pack((bits >> 16).astype(np.uint16), width, group).unpack(), pack(bits.view(np.float32), width, group).unpack()
    )


@kinds
def test_a_channel_does_not_depend_on_others(isa: str, width: Width, group: int) -> None:
    weight = draw("heavy tails", 70, 200)
    whole = pack(weight, width, group).unpack()
    for channel in (0, 15, 16, 31, 32, 69):
        alone = pack(weight[channel : channel + 1], width, group).unpack()
        assert np.array_equal(alone[0], whole[channel])

"""Triton's rows in its interpreter against the definitions."""

import numpy as np
import pytest
import torch
from fp8 import trusted

from millrace.kernels.reference import rows as reference
from millrace.kernels.triton.rows import add_rms_norm, gate

SIZES = [1, 7, 33, 64, 129, 960]
DTYPES = [torch.float32, torch.float16]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3}


def random_rows(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    """Relative, by the Frobenius norm."""
    distance = np.linalg.norm(found.double().numpy() - wanted)
    return float(distance / max(np.linalg.norm(wanted), 1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norm(size: int, dtype: torch.dtype) -> None:
    x, weight = random_rows(3, size, dtype), random_rows(1, size, dtype)[0]
    out, scales = add_rms_norm(x, weight, 1e-5)
    assert scales is None
    assert error(out, reference.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-5)) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_kept_and_normed(dtype: torch.dtype) -> None:
    x, residual, weight = random_rows(5, 65, dtype), random_rows(5, 65, dtype).flip(0), random_rows(1, 65, dtype)[0]
    wanted = (x.float() + residual.float()).to(dtype)
    out, _ = add_rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(residual, wanted)
    assert error(out, reference.rms_norm(wanted.double().numpy(), weight.double().numpy(), 1e-5)) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("size", SIZES)
def test_quantised_norm(size: int, dtype: torch.dtype) -> None:
    x, weight = random_rows(4, size, torch.float32), random_rows(1, size, torch.float32)[0]
    x[2] = 0
    wanted = reference.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-5)
    check_quantised(*add_rms_norm(x, weight, 1e-5, dtype=dtype), wanted)


def check_quantised(out: torch.Tensor, scales: torch.Tensor | None, wanted: np.ndarray) -> None:
    assert scales is not None
    most = 127 if out.dtype == torch.int8 else 448
    assert np.allclose(scales.numpy(), np.abs(wanted).max(1) / most, rtol=1e-4)
    back = out.double().numpy() * scales.double().numpy()[:, None]
    step = np.abs(wanted).max(1, keepdims=True) / 127 / 2 if out.dtype == torch.int8 else np.abs(wanted) / 16
    right = np.abs(back - wanted) <= 1.01 * step + 1e-6
    if out.dtype == torch.float8_e4m3fn:
        exact = torch.from_numpy(wanted) / torch.where(scales > 0, scales, 1.0)[:, None]
        right |= ~trusted(exact).numpy()
    assert right.all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("size", SIZES)
def test_gate(size: int, activation: str) -> None:
    x = random_rows(3, 2 * size, torch.float32)
    wanted = reference.ACTIVATIONS[activation](x[:, :size].numpy()) * x[:, size:].double().numpy()
    out, scales = gate(x, activation)
    assert scales is None
    assert error(out, wanted) < 1e-5
    for dtype in QUANTIZED:
        check_quantised(*gate(x, activation, dtype), wanted)


def test_no_rows() -> None:
    assert add_rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5)[0].shape == (0, 8)
    assert gate(torch.empty(0, 8), "silu", torch.int8)[0].shape == (0, 4)

"""One row at a time on an NVIDIA GPU: residual, norm, activation, and the quantising that the next matmul wants.

`millrace.kernels.reference.rows` is the definition, `millrace.kernels.gpu` the face. A program holds a whole row in
registers, so that a row is read once and written once; sums are float32.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from millrace.kernels.triton.numbers import quantize_row


@triton.jit
def add_rms_norm_kernel(
    x, residual, weight, out, scales, size, eps, ADDS: tl.constexpr, QUANTIZES: tl.constexpr, BLOCK: tl.constexpr
):
    """`residual` [rows, size] += `x`, if it ADDS; `out` = `weight` times the sum over the root of its mean square.

    QUANTIZES: `out` is int8 or fp8 and `scales` [rows] gives back what it was.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, inside, 0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + row * size + columns, inside, 0.0).to(tl.float32)
        # What is kept is what is normed: the next layer adds to the rounded sum.
        kept = values.to(residual.dtype.element_ty)
        tl.store(residual + row * size + columns, kept, inside)
        values = kept.to(tl.float32)
    turned = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / size + eps))
    turned *= tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if QUANTIZES:
        turned, scale = quantize_row(turned, out.dtype.element_ty)
        tl.store(scales + row, scale)
    tl.store(out + row * size + columns, turned.to(out.dtype.element_ty), inside)


@triton.jit
def gate_kernel(x, out, scales, size, ACTIVATION: tl.constexpr, QUANTIZES: tl.constexpr, BLOCK: tl.constexpr):
    """`out` [rows, size] = activation of the first half of `x` [rows, 2 x size] times its second half."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    gates = tl.load(x + row * 2 * size + columns, inside, 0.0).to(tl.float32)
    ups = tl.load(x + row * 2 * size + size + columns, inside, 0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gates = gates / (1.0 + tl.exp(-gates))
    elif ACTIVATION == "gelu":
        gates = 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
    else:  # gelu_tanh: (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
        gates = gates / (1.0 + tl.exp(-1.5957691216057308 * (gates + 0.044715 * gates * gates * gates)))
    values = gates * ups
    if QUANTIZES:
        values, scale = quantize_row(values, out.dtype.element_ty)
        tl.store(scales + row, scale)
    tl.store(out + row * size + columns, values.to(out.dtype.element_ty), inside)


def add_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """`weight` [size] times each row of `x` [rows, size] over the root of its mean square plus `eps`.

    With `residual`, which becomes the sum in place, that sum is normed. `dtype` int8 or float8_e4m3fn: quantised, with
    the scales [rows]; else None for these.
    """
    rows, size = x.shape
    out = torch.empty_like(x, dtype=dtype)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device) if is_quantized(dtype) else None
    block = triton.next_power_of_2(size)
    if rows:
        add_rms_norm_kernel[(rows,)](
            x, x if residual is None else residual, weight, out, out if scales is None else scales, size, eps,
            ADDS=residual is not None, QUANTIZES=scales is not None, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return out, scales


def gate(x: Tensor, activation: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """[rows, size] of `x` [rows, 2 x size]: `activation` ("silu", "gelu", "gelu_tanh") of the first half times the
    second. `dtype` as of `add_rms_norm`."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, size), dtype=dtype or x.dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device) if is_quantized(dtype) else None
    block = triton.next_power_of_2(size)
    if rows:
        gate_kernel[(rows,)](
            x, out, out if scales is None else scales, size,
            ACTIVATION=activation, QUANTIZES=scales is not None, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return out, scales


def is_quantized(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.int8, torch.float8_e4m3fn)


def warps(block: int) -> int:
    """Of a program that holds so many numbers: 16 or so for each thread."""
    return min(16, max(1, block // 512))

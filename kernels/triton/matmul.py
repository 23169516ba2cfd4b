"""Products with weights of few bits: x [m, k] times weights [n, k] transposed, sums in float32 or int32.

Where few rows would leave most of the GPU idle, k is split and the parts are added in a fixed order, never by atomics.
Tiles are visited in groups of rows, so that those that run together share what they read.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from millrace.kernels.triton.configs import Config, config_of
from millrace.kernels.triton.numbers import INTERPRETED


@triton.jit
def tile_of(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which tile a program has, [row, column], GROUP rows of tiles at a time."""
    high, wide = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP * wide) * GROUP
    rows = tl.minimum(high - first, GROUP)
    return first + program % (GROUP * wide) % rows, program % (GROUP * wide) // rows


@triton.jit
def scaled_kernel(
    x,
    weights,
    x_scales,
    scales,
    out,
    m,
    n,
    k,
    UPCASTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """int8 or fp8 x and weights [n, k], with scales of rows [m] and of columns [n].

    SPLITS 1: out [m, n]. Else out float32 [SPLITS, m, n], of the parts of k.
    """
    row, column = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    split = tl.program_id(1)
    rows, columns, inner = (
        row * BLOCK_M + tl.arange(0, BLOCK_M),
        column * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
    )
    is_integer: tl.constexpr = weights.dtype.element_ty == tl.int8
    number: tl.constexpr = tl.int32 if is_integer else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], number)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS)
    left = x + rows[:, None].to(tl.int64) * k + inner[None, :]
    right = weights + columns[None, :].to(tl.int64) * k + inner[:, None]
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(k, BLOCK_K))):
        there = step * BLOCK_K + inner < k
        a = tl.load(left + step * BLOCK_K, (rows < m)[:, None] & there[None, :], 0.0)
        b = tl.load(right + step * BLOCK_K, (columns < n)[None, :] & there[:, None], 0.0)
        if UPCASTS and not is_integer:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, out_dtype=number)
    product = total.to(tl.float32) * tl.load(x_scales + rows, rows < m, 0.0)[:, None]
    product *= tl.load(scales + columns, columns < n, 0.0)[None, :]
    place = (split.to(tl.int64) * m + rows[:, None]) * n + columns[None, :]
    tl.store(out + place, product.to(out.dtype.element_ty), (rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def int4_kernel(
    x,
    weights,
    scales,
    zeros,
    out,
    m,
    n,
    k,
    GROUP_K: tl.constexpr,
    UPCASTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """16-bit x and packed weights: the low halves of the bytes [k, n / 2] are the first n / 2 columns, the high halves
    the others, so that unpacking moves nothing. scales and zeros [k / GROUP_K, n], in the numbers of x.

    BLOCK_N columns of either half. BLOCK_K divides GROUP_K or is a multiple of it. out: as of `scaled_kernel`.
    """
    half = n // 2
    row, column = tile_of(tl.program_id(0), m, half, BLOCK_M, BLOCK_N, GROUP)
    split = tl.program_id(1)
    rows, columns, inner = (
        row * BLOCK_M + tl.arange(0, BLOCK_M),
        column * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
    )
    low = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(k, BLOCK_K))):
        at = step * BLOCK_K + inner
        there = (at < k)[:, None] & (columns < half)[None, :]
        a = tl.load(x + rows[:, None].to(tl.int64) * k + at[None, :], (rows < m)[:, None] & (at < k)[None, :], 0.0)
        packed = tl.load(weights + at[:, None].to(tl.int64) * half + columns[None, :], there, 0)
        if BLOCK_K <= GROUP_K:
            group = step * BLOCK_K // GROUP_K + tl.zeros([1], tl.int32)
        else:
            group = at // GROUP_K
        of = group[:, None] * n + columns[None, :]
        known = (columns < half)[None, :] & (group < tl.cdiv(k, GROUP_K))[:, None]
        first = (packed & 0xF).to(tl.float32) - tl.load(zeros + of, known, 0.0).to(tl.float32)
        second = (packed >> 4).to(tl.float32) - tl.load(zeros + of + half, known, 0.0).to(tl.float32)
        first *= tl.load(scales + of, known, 0.0).to(tl.float32)
        second *= tl.load(scales + of + half, known, 0.0).to(tl.float32)
        if UPCASTS:
            # To what the GPU multiplies, and back: the interpreter knows no product of 16 bits.
            first, second = first.to(a.dtype).to(tl.float32), second.to(a.dtype).to(tl.float32)
            a = a.to(tl.float32)
        else:
            first, second = first.to(a.dtype), second.to(a.dtype)
        low = tl.dot(a, first, low)
        high = tl.dot(a, second, high)
    place = (split.to(tl.int64) * m + rows[:, None]) * n + columns[None, :]
    kept = (rows < m)[:, None] & (columns < half)[None, :]
    tl.store(out + place, low.to(out.dtype.element_ty), kept)
    tl.store(out + place + half, high.to(out.dtype.element_ty), kept)


@triton.jit
def add_splits_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = the sum of parts float32 [SPLITS, size], in ascending order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + at, at < size, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


def scaled_matmul(
    x: Tensor, weights: Tensor, x_scales: Tensor, scales: Tensor, dtype: torch.dtype, config: Config | None = None
) -> Tensor:
    """[m, n] of int8 or fp8 x [m, k] and weights [n, k], rows scaled by x_scales [m], columns by scales [n]."""
    (m, k), n = x.shape, weights.shape[0]
    config = config or config_of("scaled", m, n, k, x.device)
    out, parts = results(m, n, dtype, config, x.device)
    if m:
        grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), config.splits)
        scaled_kernel[grid](
            x, weights, x_scales, scales, parts, m, n, k, UPCASTS=INTERPRETED, **config.arguments
        )  # fmt: skip
        join(parts, out, config)
    return out


def int4_matmul(
    x: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor, group: int, config: Config | None = None
) -> Tensor:
    """[m, n] of 16-bit x [m, k] and weights packed by `pack_int4`; scales and zeros [ceil(k / group), n]."""
    (m, k), n = x.shape, 2 * weights.shape[1]
    config = config or config_of("int4", m, n, k, x.device)
    out, parts = results(m, n, x.dtype, config, x.device)
    if m:
        grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n // 2, config.block_n), config.splits)
        int4_kernel[grid](
            x, weights, scales, zeros, parts, m, n, k, GROUP_K=group, UPCASTS=INTERPRETED, **config.arguments
        )  # fmt: skip
        join(parts, out, config)
    return out


def pack_int4(numbers: Tensor) -> Tensor:
    """uint8 [k, n / 2] of numbers 0 to 15 [n, k]: column j in the low half of a byte, column n / 2 + j in the high one.

    ValueError: an odd n.
    """
    n = numbers.shape[0]
    if n % 2:
        raise ValueError(f"int4 weights need an even number of outputs, not {n}")
    low, high = numbers.to(torch.uint8).t().split(n // 2, dim=1)
    return (low | high << 4).contiguous()


def results(m: int, n: int, dtype: torch.dtype, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The product, and where the kernel writes: the same, or a part for each split."""
    out = torch.empty((m, n), dtype=dtype, device=device)
    if config.splits == 1:
        return out, out
    return out, torch.empty((config.splits, m, n), dtype=torch.float32, device=device)


def join(parts: Tensor, out: Tensor, config: Config) -> None:
    if config.splits > 1:
        size = out.numel()
        add_splits_kernel[(triton.cdiv(size, 1024),)](parts, out, size, SPLITS=config.splits, BLOCK=1024)

"""Numbers of few bits, in Triton."""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # in numpy, which knows no product of 16-bit numbers

INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)  # of e4m3
ROUNDS = tl.constexpr(12582912.0)  # 1.5 x 2^23: added and taken away, it leaves a float32 of magnitude < 2^22 whole


@triton.jit
def to_nearest(x):
    """float32 to the nearest whole number, ties to even."""
    return (x + ROUNDS) - ROUNDS


@triton.jit
def quantize_row(x, dtype: tl.constexpr):
    """A row of float32 in the range of int8 or fp8, and the scale that gives it back: zeros have scale 0."""
    most: tl.constexpr = INT8_MAX if dtype == tl.int8 else FP8_MAX
    scale = tl.max(tl.abs(x), 0) / most
    x = x / tl.where(scale > 0.0, scale, 1.0)
    if dtype == tl.int8:
        x = to_nearest(x)
    return x, scale

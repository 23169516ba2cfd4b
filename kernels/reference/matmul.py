"""Products with packed weights: sums by width, and what becomes of them. The native kernels round to float32.

bf16: numbers are rounded to bf16, their products and sums are in float64.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.kernels.reference.rows import ACTIVATIONS, widened

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def to_bf16(x: Array) -> NDArray[np.uint16]:
    """The bits of finite numbers, rounded to nearest, ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, np.uint16)


def rounded(x: Array) -> Float64:
    return widened(to_bf16(x), "bfloat16")


def sums_bf16(x: Array, weight: Array) -> Float64:
    """[m, k] and [n, k], any float dtype: [m, n]."""
    return np.asarray(rounded(x) @ rounded(weight).T)


def finish(
    sums: Float64,
    bias: Array | None = None,
    epilogue: str = "store",
    activation: str = "none",
    out: Array | None = None,
) -> Float64:
    """What a product of sums [m, n] leaves; activate and gate are then rounded to bf16."""
    if bias is not None:
        sums = sums + bias
    if epilogue == "add":
        assert out is not None
        return np.asarray(out + sums)
    if epilogue == "activate":
        return ACTIVATIONS[activation](sums)
    if epilogue == "gate":
        gate, up = np.moveaxis(sums.reshape(len(sums), -1, 2, 16), 2, 0).reshape(2, len(sums), -1)
        return np.asarray(ACTIVATIONS[activation](gate) * up)
    return sums

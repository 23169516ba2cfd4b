"""What tiles make of products of bf16, bit for bit: the order and the rounding of TDPBF16PS (Intel SDM volume 2)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

PER_TILE = 32  # numbers of k that one instruction meets
LEAST_NORMAL = np.finfo(np.float32).tiny


def flush(x: NDArray[Any]) -> Float32:
    """As float32; denormals are zeros."""
    x = x.astype(np.float32)
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def multiply_add(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c rounded once, of bf16 a and b: in float64 both steps are exact enough to round to float32 after."""
    return flush(a.astype(np.float64) * b + c)


def matmul_tiles(x: Float32, weights: Float32) -> Float32:
    """x [m, k] times weights [n, k] transposed, both of numbers that bf16 holds: float32 [m, n].

    Of each 32 k the products at even and at odd k are summed apart, from zero, k ascending; the two sums are added,
    and their sum is added to that of the 32 k before.
    """
    x, weights = flush(x), flush(weights)
    total = np.zeros((len(x), len(weights)), np.float32)
    for first in range(0, x.shape[1], PER_TILE):
        apart = [np.zeros_like(total), np.zeros_like(total)]
        for k in range(first, min(first + PER_TILE, x.shape[1])):
            apart[k % 2] = multiply_add(x[:, k, None], weights[None, :, k], apart[k % 2])
        total = flush(total + flush(apart[0] + apart[1]))
    return total

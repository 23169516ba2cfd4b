"""The definition of products of int8 activations with integer weights, bit for bit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.kernels.reference.hadamard import transform
from millrace.kernels.reference.quantization import LEAST_MAGNITUDE, Quantized

Float32 = NDArray[np.float32]
Array = NDArray[Any]


def encode(x: Float32) -> tuple[NDArray[np.int32], Float32]:
    """Rows [m, k] as whole numbers in [-127, 127] and their scales [m]: transform(x) is nearly scales * numbers.

    A row whose magnitudes are then all below 2^-118 becomes zeros with scale 0; one that holds NaN, infinity or what
    overflows in transform(), NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x = transform(x)
    finite = np.asarray(np.isfinite(x).all(axis=1))
    largest = np.where(finite, np.abs(np.where(finite[:, None], x, 0)).max(axis=1), 0).astype(np.float32)
    live = largest >= np.float32(LEAST_MAGNITUDE)
    scales = np.where(live, largest / np.float32(127), np.float32(0)).astype(np.float32)
    inverse = np.where(live, np.float32(127) / np.where(live, largest, np.float32(1)), np.float32(0))
    numbers = np.rint(np.where(finite[:, None], x, 0) * inverse[:, None].astype(np.float32))
    return numbers.astype(np.int32), np.where(finite, scales, np.float32(np.nan))


def matmul_int(x: Float32, weights: Quantized) -> Float32:
    """x [m, k] times the weights [n, k] transposed: float32 [m, n].

    The sums of a group are exact. Of int8 weights: scale of x * (scale of the weights * sum). Of int4 ones: the sums of
    the groups, each times its scale, are added up in order of k, each step rounded once; then times the scale of x.
    """
    numbers, x_scales = encode(x)
    k, size = numbers.shape[1], weights.group
    total = np.zeros((len(x), len(weights.codes)), np.float32)
    for g, first in enumerate(range(0, k, size)):
        group = slice(first, first + size)
        dots = numbers[:, group].astype(np.int64) @ weights.codes[:, group].T.astype(np.int64)
        # A float64 holds the product of two float32, and a fused multiply and add rounds once.
        total = (dots.astype(np.float32).astype(np.float64) * weights.scales[:, g] + total).astype(np.float32)
    return np.asarray(x_scales[:, None] * total, np.float32)

"""What is done to one row at a time, in float64: rows are [rows, size]. The native kernels round to float32."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def rms_norm(x: Array, weight: Array, eps: float) -> Float64:
    """Zhang and Sennrich 2019, arXiv:1910.07467."""
    x = x.astype(np.float64)
    return np.asarray(weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Float64:
    """Ba et al. 2016, arXiv:1607.06450."""
    x = x.astype(np.float64)
    return np.asarray(weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) + bias)


def rotary_turns(positions: Array, frequencies: Array, factor: float) -> tuple[Float64, Float64]:
    """Cosine and sine of angles that are rounded to float32, [rows, dim / 2]."""
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    return np.cos(angles) * factor, np.sin(angles) * factor


def rotate(x: Array, dim: int, cosine: Array, sine: Array) -> Float64:
    """Su et al. 2021, arXiv:2104.09864, with halves in place of neighbours: heads [rows, heads x dim]."""
    first, second = np.split(x.astype(np.float64).reshape(len(x), -1, dim), 2, -1)
    cosine, sine = cosine[:, None], sine[:, None]
    turned = np.concatenate((first * cosine - second * sine, second * cosine + first * sine), -1)
    return np.asarray(turned.reshape(x.shape))


def widened(table: Array, stored: str) -> Float64:
    """Stored numbers; 16-bit ones as bits in uint16."""
    if stored == "bfloat16":
        return np.asarray((table.astype(np.uint32) << 16).view(np.float32), np.float64)
    return np.asarray(table.view(np.float16) if stored == "float16" else table, np.float64)


def mean_rows(x: Array) -> Float64:
    return np.asarray(x.astype(np.float64).mean(0, keepdims=True))


def normalize(x: Array) -> Float64:
    x = x.astype(np.float64)
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    return np.asarray(np.divide(x, length, out=np.zeros_like(x), where=length > 0))


def silu(x: Array) -> Float64:
    """x / (1 + e^-x): Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return np.asarray(x / (1 + np.exp(-x.astype(np.float64))))


def gelu(x: Array) -> Float64:
    """x times the normal distribution's probability of less: Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    erfc = np.vectorize(math.erfc, otypes=[np.float64])
    return np.asarray(x * erfc(-x.astype(np.float64) / math.sqrt(2)) / 2)


def gelu_tanh(x: Array) -> Float64:
    """The approximation of `gelu` by tanh: (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)."""
    x = x.astype(np.float64)
    return np.asarray(x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def relu(x: Array) -> Float64:
    return np.asarray(np.maximum(x, 0), np.float64)


ACTIVATIONS: dict[str, Callable[[Array], Float64]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "none": lambda x: np.asarray(x, np.float64),
}

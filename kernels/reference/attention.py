"""The definition of attention, over keys and values as they were stored: float64 softmax, one query at a time."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def to_bf16(x: Array) -> NDArray[np.uint16]:
    """Finite float32 to the upper half of its bits: to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(halves: Array) -> NDArray[np.float32]:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def quantize(x: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 [..., dim] and scales [...]: the largest magnitude of a vector becomes 127; zeros have scale 0."""
    scale = np.abs(x).max(-1) / np.float32(127)
    divisor = np.where(scale == 0, np.float32(1), scale)
    return np.rint(x / divisor[..., None]).astype(np.int8), scale


def stored(x: Array, dtype: Literal["bf16", "int8"]) -> NDArray[np.float32]:
    """What the cache gives back for keys or values [..., dim]."""
    if dtype == "bf16":
        return from_bf16(to_bf16(x))
    numbers, scale = quantize(x)
    return numbers * scale[..., None]


def attend(
    q: Array, keys: Array, values: Array, *, scale: float, causal: bool = True, window: int = 0
) -> NDArray[np.float64]:
    """One row: q [n, heads, dim] are the last n tokens of keys and values [context, kv_heads, dim]."""
    n, heads, dim = q.shape
    context, kv_heads, _ = keys.shape
    out = np.empty((n, heads, dim))
    for i in range(n):
        position = context - n + i
        begin = max(position - window + 1, 0) if window else 0
        end = position + 1 if causal else context
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            k, v = keys[begin:end, kv_head].astype(np.float64), values[begin:end, kv_head].astype(np.float64)
            scores = k @ q[i, head].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v / weights.sum()
    return out

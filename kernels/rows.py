"""What is done to one row at a time, over the rows of a matrix: the face of csrc/kernels/rows.cpp.

`millrace.kernels.reference.rows` is the definition. Rows are float32 [rows, size], size at least 1, contiguous; no rows
is fine. `out` may be `x` but overlaps nothing else; without it a new array is returned. The result of a row depends
on that row alone and is equal on every instruction set, bit for bit. ValueError: a wrong dtype, shape or value, or an
instruction set below AVX2. Runs on the calling thread, without the GIL.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.kernels import _C

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


def rms_norm(x: Float32, weight: Float32, eps: float, out: Float32 | None = None) -> Float32:
    """`weight` [size] times each row over the root of its mean square plus `eps` > 0, which must fit float32."""
    out = np.empty_like(x) if out is None else out
    _C.rms_norm(x, weight, eps, out)
    return out


def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float, out: Float32 | None = None) -> Float32:
    """Each row less its mean, over the root of its variance plus `eps` > 0, times `weight` plus `bias`, both [size]."""
    out = np.empty_like(x) if out is None else out
    _C.layer_norm(x, weight, bias, eps, out)
    return out


def rotary_turns(positions: Int32, frequencies: Float32, factor: float = 1.0) -> tuple[Float32, Float32]:
    """Cosine and sine, each [rows, dim / 2], of positions [rows] in [0, 2^24] times frequencies [dim / 2] in [0, 1].

    The angles are rounded to float32; cosine and sine, before `factor`, are within one unit in the last place.
    """
    cosine, sine = (np.empty((len(positions), len(frequencies)), np.float32) for _ in range(2))
    _C.rotary_turns(positions, frequencies, factor, cosine, sine)
    return cosine, sine


def rotate(x: Float32, dim: int, cosine: Float32, sine: Float32) -> None:
    """Turn the heads of `x` [rows, heads x dim] in place: element i of the first half with element i of the second."""
    _C.rotate(x, dim, cosine, sine)


def embed_rows(table: NDArray[Any], stored: str, ids: Int32, out: Float32, accumulate: bool = False) -> None:
    """Rows `ids` of a table [vocabulary, size], written to or added to `out` [len(ids), size].

    `stored`: float32, or float16 or bfloat16 as bits in uint16.
    """
    _C.embed_rows(table, stored, ids, accumulate, out)


def add_rows(x: Float32, out: Float32) -> None:
    """`out` += `x`, of equal shapes."""
    _C.add_rows(x, out)


def mean_rows(x: Float32, out: Float32 | None = None) -> Float32:
    """[1, size]: the mean of at least one row, added up in ascending order."""
    out = np.empty_like(x[:1]) if out is None else out
    _C.mean_rows(x, out)
    return out


def normalize(x: Float32) -> None:
    """Divide each row by its Euclidean length in place; zeros stay zeros."""
    _C.normalize(x)


def activate(x: Float32, kind: str, out: Float32 | None = None) -> Float32:
    """`kind` of each element: silu, gelu, gelu_tanh, relu, none."""
    out = np.empty_like(x) if out is None else out
    _C.activate(x, kind, out)
    return out


def exp(x: Float32, out: Float32 | None = None) -> Float32:
    """e to each element, as activations and attention take it: 0 below -87."""
    out = np.empty_like(x) if out is None else out
    _C.exp(x, out)
    return out

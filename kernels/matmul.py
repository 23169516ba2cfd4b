"""Products of activations with packed weights: the face of csrc/kernels/matmul.cpp.

`millrace.kernels.reference.matmul` is the definition. The engine calls csrc itself; this face is for tests and benches.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from millrace.kernels import _C

Width = Literal["bf16", "int8", "int4"]
Epilogue = Literal["store", "add", "activate", "gate"]
Activation = Literal["none", "silu", "gelu", "gelu_tanh", "relu"]
PackedWeights = _C.PackedWeights
Array = NDArray[Any]


def pack(weight: Array, width: Width, group: int = 0) -> PackedWeights:
    """Weights [n, k] of float32, float16 or uint16 (the bits of bfloat16), in the layout the kernels read.

    k is at most 65,536. `group`: of k, for int4, 32 or 128; else 0. ValueError: another shape or dtype, a number that
    is NaN, infinite, or too large for bf16. `unpack()` of the result gives float32 [n, k] less what packing lost.
    """
    return PackedWeights(weight, width, group)


def matmul(
    x: Array,
    weights: PackedWeights,
    bias: NDArray[np.float32] | None = None,
    epilogue: Epilogue = "store",
    activation: Activation = "none",
    out: Array | None = None,
    rows: tuple[int, int] | None = None,
    blocks: tuple[int, int] | None = None,
) -> Array:
    """epilogue(x @ weights.T + bias) of x [m, k], float32 or uint16 (the bits of bfloat16), on the calling thread.

    store       out float32 [m, n] = the sum
    add         out float32 [m, n] += the sum; `out` is required
    activate    out uint16 [m, n] = bf16(activation(sum))
    gate        out uint16 [m, n / 2] = bf16(activation(gate) * up), where each 32 channels of the weights are 16 gates
                and their 16 ups; n is a multiple of 32
    rows        [first, last) of x; the others are neither read nor written; None: all
    blocks      [first, last) of the blocks of 32 channels, likewise

    Rows are contiguous, with any stride between them. A row's result does not depend on the other rows nor on ranges.
    ValueError: a wrong dtype, shape or range; a processor without AVX2. Runs without the GIL.
    """
    if out is None:
        if epilogue == "add":
            raise ValueError("add needs out: the numbers to add to")
        n = weights.shape[0]
        columns = n // 2 if epilogue == "gate" else n
        out = np.empty((x.shape[0], columns), np.uint16 if epilogue in ("activate", "gate") else np.float32)
    _C.matmul(
        x=x,
        weights=weights,
        bias=bias,
        epilogue=epilogue,
        activation=activation,
        out=out,
        rows=rows,
        blocks=blocks,
    )
    return out

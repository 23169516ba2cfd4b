"""The definition of csrc/kernels/hadamard.h: the randomised Hadamard transform of whole blocks of 64 inputs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Array = NDArray[Any]

BLOCK = 64
_BITS = np.arange(BLOCK)[:, None] >> np.arange(6) & 1
SIGNS: Array = np.where((_BITS[:, ::2] * _BITS[:, 1::2]).sum(axis=1) % 2 == 1, -1, 1).astype(np.float32)


def hadamard(blocks: Array) -> Array:
    """H x for rows [..., 64], in float32, neighbours added first; H H = 64."""
    x = blocks
    for distance in 2 ** np.arange(6):
        pairs = x.reshape(-1, BLOCK // (2 * distance), 2, distance)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack((low + high, low - high), axis=2)
    return x.reshape(blocks.shape)


def _whole_blocks(x: Array) -> tuple[Array, Float32]:
    """The rows' whole blocks [m, blocks, 64], and a copy of the rows [m, k] to put them into."""
    out = np.array(x, np.float32, order="C")
    m, k = out.shape
    return out[:, : k - k % BLOCK].reshape(m, -1, BLOCK), out


def transform(x: Array) -> Float32:
    """Activations or weights [m, k] as products meet them: H D x / 8 of every whole block of 64."""
    blocks, out = _whole_blocks(x)
    out[:, : blocks.shape[1] * BLOCK] = hadamard(blocks * SIGNS / np.float32(8)).reshape(len(out), -1)
    return out


def transform_back(x: Array) -> Float32:
    """The inverse: D H x / 8."""
    blocks, out = _whole_blocks(x)
    out[:, : blocks.shape[1] * BLOCK] = (SIGNS * hadamard(blocks / np.float32(8))).reshape(len(out), -1)
    return out

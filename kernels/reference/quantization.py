"""The definition of csrc/kernels/quantization.h: weights as integers with the least squared error.

A channel (int8) or a group of it (int4) is w = s * d, d whole numbers: [-127, 127], or [0, 15] less a zero point in
[0, 15]. Round-to-nearest takes s from the extremes. Here, for int4, a grid of clipped ranges is tried; for each the
codes, for these codes the best s in closed form (least squares), and the best of all is refined the same way, with the
neighbouring zero points: the method of make_qkx2_quants of llama.cpp (ggml-quants.c), for whole zero points. int8 has
steps too fine for clipping to pay, and is refined only. It is the transformed weights that are quantised: hadamard.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.kernels.reference.hadamard import transform, transform_back

Float32 = NDArray[np.float32]
Array = NDArray[Any]

LEAST_MAGNITUDE = 2.0**-118  # below it a number counts as zero


@dataclass(frozen=True, slots=True)
class Quantized:
    """transformed weights[n, g * group + i] = scales[n, g] * codes[n, g * group + i]: int8 has one group."""

    codes: NDArray[np.int32]  # [n, k] less the zero point
    scales: Float32  # [n, groups]
    zeros: NDArray[np.int32]  # [n, groups] 0 for int8
    group: int

    def values(self) -> Float32:
        """Weights [n, k] as the checkpoint would hold them."""
        scales = np.repeat(self.scales, self.group, axis=1)[:, : self.codes.shape[1]]
        return transform_back(scales * self.codes.astype(np.float32))


def round_to_bf16(x: Array) -> Float32:
    """Nearest bfloat16, ties to even; finite numbers only."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def quantize(weight: Float32, group: int = 0, search: bool = True) -> Quantized:
    """Weights [n, k] as int4 in groups of `group`, or as int8 where it is 0; `search` False: round to nearest."""
    n, k = weight.shape
    size = group or k
    groups = -(-k // size)
    padded = np.zeros((n, groups * size))
    padded[:, :k] = transform(weight)
    rows = padded.reshape(n * groups, size)
    largest = np.abs(rows).max(axis=1)
    live = largest >= LEAST_MAGNITUDE
    rows = np.where(live[:, None], rows / np.where(live, largest, 1)[:, None], 0)
    best = Search(rows, largest * live, int4=group > 0)
    best.step, best.zero = best.candidate(1.0)
    if search:
        for ratio in np.arange(21, 13, -1) / 20 if group else ():
            best.try_codes(*best.candidate(ratio))
        for _ in range(2):
            step, zero = best.step, best.zero
            for shift in (0, -1, 1) if group else (0,):
                best.try_codes(step, np.clip(zero + shift, 0, 15))
    codes = best.codes(best.step, best.zero).reshape(n, -1)[:, :k]
    scales = (best.step * largest).astype(np.float32).reshape(n, groups)
    return Quantized(codes.astype(np.int32), scales, best.zero.astype(np.int32).reshape(n, groups), size)


class Search:
    """The best step and zero point found for rows [r, size], whose largest magnitude is divided out."""

    def __init__(self, rows: Array, largest: Array, int4: bool) -> None:
        self.rows, self.largest, self.int4 = rows, largest, int4
        self.step = np.zeros(len(rows))
        self.zero = np.zeros(len(rows))
        self.error = np.full(len(rows), np.inf)

    def stored(self, step: Array) -> Array:
        """As the scale will be stored: bfloat16 for int4."""
        if not self.int4:
            return step
        return round_to_bf16(step * self.largest) / np.where(self.largest > 0, self.largest, 1)

    def codes(self, step: Array, zero: Array) -> Array:
        inverse = 1 / np.where(step > 0, step, np.inf)
        least, most = (-zero, 15 - zero) if self.int4 else (zero - 127, zero + 127)
        return np.clip(np.rint(self.rows * inverse[:, None]), least[:, None], most[:, None])

    def candidate(self, ratio: float) -> tuple[Array, Array]:
        """Step and zero point of the range between the extremes, and zero, times `ratio`."""
        if not self.int4:
            return np.where(self.largest > 0, ratio / 127, 0), np.zeros(len(self.rows))
        low, high = np.minimum(self.rows.min(axis=1), 0), np.maximum(self.rows.max(axis=1), 0)
        step = self.stored((high - low) * ratio / 15)
        return step, np.clip(np.rint(-low * ratio / np.where(step > 0, step, np.inf)), 0, 15)

    def try_codes(self, step: Array, zero: Array) -> None:
        """Takes the best step for the codes that `step` and `zero` lead to, if it is the best so far."""
        codes = self.codes(step, zero)
        products, squares = (self.rows * codes).sum(axis=1), (codes * codes).sum(axis=1)
        best = self.stored(products / np.maximum(squares, 1))
        error = ((self.rows - best[:, None] * codes) ** 2).sum(axis=1)
        better = error < self.error
        self.step, self.zero = np.where(better, best, self.step), np.where(better, zero, self.zero)
        self.error = np.where(better, error, self.error)

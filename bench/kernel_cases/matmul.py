"""Matrix products beside PyTorch's in bf16.

The shapes are those of a model of 1.2 G parameters (hidden 2048, MLP 8192). Products cycle through copies of the
weights that no cache holds: few rows are bound by the memory, and many by arithmetic.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from millrace.bench.kernel_cases.case import Case
from millrace.kernels.matmul import Width, matmul, pack

SHAPES = {"qkv, o": (2048, 2048), "gate-up": (16_384, 2048), "down": (2048, 8192)}  # output, input channels
ROWS = (1, 8, 32, 512)
WORKING_SET = 128 << 20  # bytes: several times the last cache
BITS: dict[Width, float] = {"bf16": 16, "int8": 8, "int4": 4.15625}  # of a weight, with its scales


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for width in BITS:
        for name, (n, k) in SHAPES.items():
            weight = rng.standard_normal((n, k), np.float32)
            size = n * k * BITS[width] / 8
            packed = [pack(weight, width, 128 if width == "int4" else 0) for _ in range(int(WORKING_SET // size) + 1)]
            tensor = torch.from_numpy(weight).bfloat16()
            tensors = [tensor.clone() for _ in range(WORKING_SET // (2 * n * k) + 1)]
            for m in ROWS:
                x, out = rng.standard_normal((m, k), np.float32), np.empty((m, n), np.float32)
                halves = torch.from_numpy(x).bfloat16()
                yield Case(
                    "matmul",
                    f"{width} {m} rows, {n} x {k} ({name})",
                    [partial(matmul, x, weights, out=out) for weights in packed],
                    [partial(F.linear, halves, weights) for weights in tensors],
                    bytes=size,
                    operations=2.0 * m * n * k,
                    arithmetics=("bf16", "fp32") if width == "bf16" else ("int8",),
                )

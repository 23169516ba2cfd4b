"""Norms and rotary positions beside PyTorch's."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from millrace.bench.kernel_cases.case import Case
from millrace.kernels import rows

ROWS, SIZES = 512, (768, 2048, 8192)
HEADS = ((32, 64), (32, 128))  # heads, dim


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for size in SIZES:
        x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, size), size, size))
        out, (tx, tw, tb) = np.empty_like(x), (torch.from_numpy(array) for array in (x, weight, bias))
        rms = partial(F.rms_norm, tx, (size,), tw, 1e-6)
        yield Case("rms_norm", f"{size}", [partial(rows.rms_norm, x, weight, 1e-6, out)], [rms], x.nbytes, 0)
        layer = partial(F.layer_norm, tx, (size,), tw, tb, 1e-6)
        yield Case(
            "layer_norm", f"{size}", [partial(rows.layer_norm, x, weight, bias, 1e-6, out)], [layer], x.nbytes, 0
        )
    for heads, dim in HEADS:
        frequencies = (10_000.0 ** -(np.arange(dim // 2) * 2 / dim)).astype(np.float32)
        positions, case = np.arange(ROWS, dtype=np.int32), f"{heads} x {dim}"
        x, turns = (
            rng.standard_normal((ROWS, heads * dim)).astype(np.float32),
            rows.rotary_turns(positions, frequencies),
        )
        peer = partial(rotated, torch.from_numpy(x).view(ROWS, heads, dim), *map(torch.from_numpy, turns))
        yield Case("rotate", case, [partial(rows.rotate, x, dim, *turns)], [peer], x.nbytes, 0)
        ours, angles = (
            partial(rows.rotary_turns, positions, frequencies),
            map(torch.from_numpy, (positions, frequencies)),
        )
        yield Case("rotary_turns", case, [ours], [partial(turned, *angles)], 2 * turns[0].nbytes, 0)


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def turned(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()

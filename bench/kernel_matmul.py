"""Matrix products beside PyTorch's in bf16: `python -m millrace.bench.kernel_matmul [--width W] [--seconds N]`.

The shapes are those of a model of 1.2 G parameters (hidden 2048, MLP 8192). Products of one thread cycle through
copies of the weights that no cache holds: few rows are bound by the memory, whose plain read is in the last column,
and many by arithmetic. `millrace.bench.kernels` has the other kernels.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from millrace.kernels import _C
from millrace.kernels.matmul import Width, matmul, pack

SHAPES = {"qkv, o": (2048, 2048), "gate-up": (16_384, 2048), "down": (2048, 8192)}  # output, input channels
ROWS = (1, 8, 32, 512)
WORKING_SET = 128 << 20  # bytes: several times the last cache
BITS: dict[Width, float] = {"bf16": 16, "int8": 8, "int4": 4.15625}  # of a weight, with its scales


class Measurement(NamedTuple):
    case: str
    rows: int
    ours: float  # seconds
    peer: float
    weight_bytes: float
    operations: float


def fastest(runs: list[Callable[[], object]], seconds: float) -> float:
    """Seconds of the fastest of as many runs as fit, at least two rounds; noise only ever adds."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    for count, run in enumerate(cycle(runs)):
        if count >= 2 * len(runs) and time.perf_counter() > end:
            return shortest
        start = time.perf_counter()
        run()
        if count >= len(runs):
            shortest = min(shortest, time.perf_counter() - start)
    raise ValueError("nothing to run")


def measurements(width: Width, seconds: float) -> Iterator[Measurement]:
    rng = np.random.default_rng(0)
    for name, (n, k) in SHAPES.items():
        weight = rng.standard_normal((n, k), np.float32)
        size = n * k * BITS[width] / 8
        packed = [pack(weight, width, 128 if width == "int4" else 0) for _ in range(int(WORKING_SET // size) + 1)]
        tensor = torch.from_numpy(weight).bfloat16()
        tensors = [tensor.clone() for _ in range(WORKING_SET // (2 * n * k) + 1)]
        for m in ROWS:
            x, out = rng.standard_normal((m, k), np.float32), np.empty((m, n), np.float32)
            halves = torch.from_numpy(x).bfloat16()
            ours = fastest([partial(matmul, x, weights, out=out) for weights in packed], seconds)
            peer = fastest([partial(F.linear, halves, weights) for weights in tensors], seconds)
            yield Measurement(f"{n} x {k} ({name})", m, ours, peer, size, 2.0 * m * n * k)


def read_rate(seconds: float) -> float:
    """Bytes per second of adding up what no cache holds."""
    numbers: NDArray[Any] = np.ones(WORKING_SET // 8)
    return numbers.nbytes / fastest([torch.from_numpy(numbers).sum], seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", choices=BITS, default="bf16", help="of the weights; default bf16")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement; default 0.3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"one thread, {_C.isa()}, {args.width}, peer: PyTorch {torch.__version__} in bf16")
    print(
        f"{'output x input channels':26}{'rows':>5}{'us':>10}{'peer':>10}{'ratio':>7}{'Gop/s':>8}{'GB/s':>7}{'read':>7}"
    )
    for m in measurements(args.width, args.seconds):
        rates = (m.operations / m.ours, m.weight_bytes / m.ours, read_rate(args.seconds))
        print(
            f"{m.case:26}{m.rows:5}{m.ours * 1e6:10.0f}{m.peer * 1e6:10.0f}{m.peer / m.ours:7.2f}"
            f"{rates[0] / 1e9:8.1f}{rates[1] / 1e9:7.1f}{rates[2] / 1e9:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

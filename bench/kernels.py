"""Kernels against PyTorch and against the machine: `python -m millrace.bench.kernels [NAME ...] [--seconds N]`.

One thread, where a case does not say more. A kernel can be bound by what it must read or by what it must compute: `of
roof` is the larger of its shares of the two roofs of as many threads, which are measured in the same run; memory again
beside each case that reads much of it. What lies in a cache can be read faster.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import cycle

from rich.console import Console

from millrace.bench.kernel_cases.case import Case, Run
from millrace.bench.roof import DRAM_BYTES, Rate, Roof, isas_up_to, measure_roof, roof_table
from millrace.kernels import _C

OUT_OF_CACHE = 64 << 20  # bytes
ROUNDS = 4  # in which memory and a case that reads it are measured by turns
KERNELS = ("matmul", "attention", "rows", "sampling")  # modules of kernel_cases, which import PyTorch


def fastest(runs: Sequence[Run], seconds: float) -> float:
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


def rate(of: Rate, threads: int) -> float:
    return of.one if threads == 1 else of.all


def compute_roof(roof: Roof, case: Case, isas: Sequence[str]) -> float:
    """Operations per second."""
    loops = [loop for loop in roof.loops if loop.what in case.arithmetics and loop.isa in isas]
    return max((rate(loop, case.threads) for loop in loops), default=float("nan"))


def measure(case: Case, roof: Roof, seconds: float) -> tuple[float, float]:
    """Seconds of a run, and bytes per second of memory: beside it where much is read, best against best."""
    if case.bytes < OUT_OF_CACHE:
        return fastest(case.ours, seconds), rate(roof.dram, case.threads)
    shortest, memory = float("inf"), 0.0
    for _ in range(ROUNDS):
        shortest = min(shortest, fastest(case.ours, seconds / ROUNDS))
        memory = max(memory, _C.roof_read(bytes=DRAM_BYTES, threads=case.threads, seconds=seconds / ROUNDS))
    return shortest, memory


def line(case: Case, ours: float, peer: float, roof: Roof, memory: float, isas: Sequence[str]) -> str:
    read = case.bytes / ours / memory
    computed = case.operations / ours / compute_roof(roof, case, isas) if case.operations else 0.0
    bound = "memory" if read >= computed else "compute"
    return (
        f"{case.kernel:13}{case.case:34}{peer / ours:8.2f}{max(read, computed):9.0%} {bound:8}{ours * 1e6:11.1f}"
        f"{peer * 1e6:11.1f}{case.bytes / ours / 1e9:8.1f}{case.operations / ours / 1e9:9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(KERNELS)}; default: all")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement; default %(default)s")
    options = parser.parse_args()
    for name in options.names:
        if name not in KERNELS:
            parser.error(f"{name!r} is none of {', '.join(KERNELS)}")
    try:
        import torch
    except ImportError:
        sys.exit("kernels: the comparison needs PyTorch: pip install torch==2.13.0")
    isa = _C.isa()
    roof, isas = measure_roof(seconds=options.seconds), isas_up_to(isa)
    Console(width=100).print(roof_table(roof))
    print(f"{isa}, peer: PyTorch {torch.__version__}")
    print(
        f"{'kernel':13}{'case':34}{'x peer':>8}{'of roof':>9} {'bound by':8}"
        f"{'us':>11}{'peer us':>11}{'GB/s':>8}{'Gop/s':>9}"
    )
    for name in options.names or KERNELS:
        for case in import_module(f"millrace.bench.kernel_cases.{name}").cases():
            torch.set_num_threads(case.threads)
            ours, memory = measure(case, roof, options.seconds)
            peer = fastest(case.peer, options.seconds)
            print(line(case, ours, peer, roof, memory, isas), flush=True)


if __name__ == "__main__":
    main()

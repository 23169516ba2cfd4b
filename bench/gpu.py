"""Every GPU kernel against float64, against its bound, and against the best at hand: `bench/gpu_check.sh`.

    python -m millrace.bench.gpu [--seconds 480] [--json FILE]
    TRITON_INTERPRET=1 python -m millrace.bench.gpu --dry-run

Needs PyTorch and Triton alone. Lines come as they are measured, and the file is complete after each, so that a run that
is cut off has told what it knows. With --dry-run small shapes run in Triton's interpreter and nothing is timed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from millrace.bench.gpu_cases import CASES, Case

FLUSHED = 256 << 20  # bytes written between runs, more than the L2 cache holds
RUNS, WARM_UPS = 20, 3
MOST_ERROR = 1e-2  # relative, by the Frobenius norm


@dataclass(frozen=True)
class Roofs:
    """Bytes and operations per second that this GPU reaches in plain copies and products."""

    copy: float
    bf16: float
    fp8: float


@dataclass(frozen=True)
class Line:
    """`share`: of the roof that bounds it. `peer`: the fastest other implementation that runs here. Seconds."""

    name: str
    error: float
    largest: float  # absolute error
    seconds: float
    share: float
    peer: str
    peer_seconds: float

    def __str__(self) -> str:
        error = f"{self.name:<44} error {self.error:.1e} (largest {self.largest:.1e})"
        if not self.seconds:
            return f"{error}  not measured"
        ratio = f"{self.peer_seconds / self.seconds:5.2f}x {self.peer}" if self.peer else "no peer"
        return f"{error} {1e6 * self.seconds:9.1f} us {self.share:6.1%} of roof  {ratio}"


def seconds_of(run: Callable[[], object]) -> float:
    """Median of runs whose data come from memory, by the GPU's own clock."""
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    for _ in range(WARM_UPS):
        run()
    times = []
    for _ in range(RUNS):
        flushed.zero_()
        event: Any = torch.cuda.Event  # PyTorch has no types for it
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return median(times)


def measure_roofs() -> Roofs:
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    low, one = torch.float8_e4m3fn, torch.ones((), device="cuda")
    a8, b8 = a.to(low), b.to(low).t().contiguous().t()
    return Roofs(
        copy=2 * source.numel() / seconds_of(lambda: target.copy_(source)),
        bf16=2 * n**3 / seconds_of(lambda: a @ b),
        fp8=2 * n**3 / seconds_of(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)),
    )


def errors(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative by the Frobenius norm, and the largest absolute one. ValueError where there is no number."""
    if not bool(found.isfinite().all()):
        raise ValueError("the result is not finite")
    distance = found.double() - wanted
    return float(distance.norm() / wanted.norm().clamp_min(1e-30)), float(distance.abs().max())


def measure(case: Case, roofs: Roofs | None) -> Line:
    error, largest = errors(case.ours(), case.wanted())
    if error > MOST_ERROR:
        raise ValueError(f"its error is {error:.1e}, at most {MOST_ERROR:.0e} is right")
    if roofs is None:
        return Line(case.name, error, largest, 0.0, 0.0, "", 0.0)
    seconds = seconds_of(case.ours)
    least = max(case.bytes / roofs.copy, case.operations / (roofs.fp8 if case.is_eight_bit else roofs.bf16))
    peers = {}
    for name, run in case.peers.items():
        try:
            peers[name] = seconds_of(run)
        except (
            RuntimeError,
            NotImplementedError,
            AttributeError,
        ) as error_of_peer:  # not for these shapes, or not here
            print(f"  {name}: {str(error_of_peer).splitlines()[0][:100]}")
    peer = min(peers, key=peers.__getitem__, default="")
    return Line(case.name, error, largest, seconds, least / seconds, peer, peers.get(peer, 0.0))


def lines(device: str, end: float, roofs: Roofs | None) -> Iterator[Line | str]:
    for make in CASES:
        for case in make(device, roofs is None):
            if time.monotonic() > end:
                yield "out of time: the rest was not measured"
                return
            try:
                yield measure(case, roofs)
            except Exception as error:  # the others still count
                yield f"{case.name}: FAILED: {type(error).__name__}: {str(error)[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=480, help="after which no further kernel is begun")
    parser.add_argument("--json", type=Path, help="where the lines are written, too")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, on this CPU, and no times")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.exit(1, "gpu: there is no GPU; --dry-run checks the kernels in Triton's interpreter\n")
    torch.manual_seed(0)
    end = time.monotonic() + options.seconds
    roofs = None if options.dry_run else measure_roofs()
    if roofs:
        print(torch.cuda.get_device_name(), f"copy {roofs.copy / 1e12:.2f} TB/s, bf16 {roofs.bf16 / 1e12:.0f}",
              f"and fp8 {roofs.fp8 / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    told, failed = [], 0
    for line in lines("cpu" if options.dry_run else "cuda", end, roofs):
        print(line, flush=True)
        failed += isinstance(line, str)
        told.append(line if isinstance(line, str) else asdict(line))
        if options.json:
            options.json.write_text(json.dumps({"roofs": roofs and asdict(roofs), "lines": told}, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""What this machine can do at most: `python -m millrace.bench.roof [--seconds N]`.

Reading memory and cache, and multiplying out of registers, on one thread and on all. Measure it in the same run as
what is compared with it: clocks, neighbours and power limits change.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from millrace.kernels import _C

DRAM_BYTES = 2 << 30  # beyond every cache
L2_MULTIPLE = 4  # of its size: out of the L2, inside the L3
DEFAULT_L2 = 1 << 20  # where the system does not tell


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes or operations per second, a multiplication and its addition being two. `isa` is empty for reading."""

    what: str
    isa: str
    one: float  # on one thread
    all: float  # on all threads together


@dataclass(frozen=True, slots=True)
class Roof:
    threads: int
    dram: Rate
    l3: Rate
    loops: tuple[Rate, ...]

    def compute(self, arithmetics: Sequence[str], isas: Sequence[str]) -> float:
        """Operations per second of the fastest loop of such arithmetic; 0 where none was measured."""
        return max((loop.all for loop in self.loops if loop.what in arithmetics and loop.isa in isas), default=0.0)


def measure_roof(threads: int | None = None, seconds: float = 0.5) -> Roof:
    """`threads`: all of this process by default. `seconds`: of each of the measurements, about twenty."""
    count = threads or len(os.sched_getaffinity(0))
    l3_bytes = L2_MULTIPLE * l2_bytes()

    def read(what: str, size: int, of_all: int) -> Rate:
        one = _C.roof_read(bytes=size, threads=1, seconds=seconds)
        return Rate(what, "", one, _C.roof_read(bytes=of_all, threads=count, seconds=seconds))

    def compute(arithmetic: str, isa: str) -> Rate:
        one, all_of_them = (
            _C.roof_compute(arithmetic=arithmetic, isa=isa, threads=number, seconds=seconds) for number in (1, count)
        )
        return Rate(arithmetic, isa, one, all_of_them)

    return Roof(
        threads=count,
        dram=read("DRAM read", DRAM_BYTES, DRAM_BYTES),
        l3=read("L3 read", l3_bytes, l3_bytes * count),
        loops=tuple(compute(arithmetic, isa) for arithmetic, isa in _C.roof_loops()),
    )


def l2_bytes() -> int:
    """Of one core."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
    except OSError:
        return DEFAULT_L2
    return int(text.strip().removesuffix("K")) * 1024


def isas_up_to(isa: str) -> list[str]:
    """What kernels forced to `isa` may use; a set that is only emulated here may use all there are."""
    found = _C.available_isas()
    return found[: found.index(isa) + 1] if isa in found else found


def roof_table(roof: Roof) -> Table:
    table = Table(title="The roof of this machine", title_justify="left")
    table.add_column("what")
    table.add_column("instructions")
    for threads in ("1 thread", f"{roof.threads} threads"):
        table.add_column(threads, justify="right")
    for rate in (roof.dram, roof.l3):
        table.add_row(rate.what, "", f"{rate.one / 1e9:.1f} GB/s", f"{rate.all / 1e9:.1f} GB/s")
    for rate in roof.loops:
        table.add_row(rate.what, rate.isa, f"{rate.one / 1e12:.3f} Top/s", f"{rate.all / 1e12:.3f} Top/s")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement; default %(default)s")
    parser.add_argument("--threads", type=int, help="default: all of this process")
    arguments = parser.parse_args()
    Console(width=100).print(roof_table(measure_roof(arguments.threads, arguments.seconds)))


if __name__ == "__main__":
    main()

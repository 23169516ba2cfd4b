"""How long a server takes to become ready: `python -m millrace.bench.startup [--model SHAPE|DIR]`.

In turns, each of `--rounds` times: the files of the checkpoint are read, and a whole server is started on them, until
it says that it is ready; first from the disk, the system's cache emptied of them, then from that cache. Beside it, the
memory that the worker has when it is ready, at most until then, and what its weights take; that of the KV cache comes
when it is used.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from millrace.bench.checkpoints import work_directory
from millrace.bench.engine import locate
from millrace.bench.serving import MIB, memory, server_flags, worker_pids
from millrace.bench.workload import Workload
from millrace.kernels import _C
from millrace.server.config import EngineConfig
from millrace.server.errors import MillraceError
from millrace.server.local import local_server
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.executors.cpu_weights import packed_bytes, stored_bytes
from millrace.server.model.executors.precision import make_precision
from millrace.server.model.weights import find_weights

CHUNK = 8 * MIB
ASKED_SECONDS, ASKED_MIB = 2.0, 250  # beyond reading the files, and beyond weights and KV cache


class Start(NamedTuple):
    """Seconds until ready, and bytes of the worker then and at most."""

    seconds: float
    resident: int
    most: int


def weight_bytes(config: EngineConfig) -> int:
    """Memory of the packed weights."""
    checkpoint = Checkpoint.open(config.checkpoint)
    return packed_bytes(checkpoint.spec, make_precision(config), stored_bytes(find_weights(checkpoint)))


def forget(paths: Sequence[Path]) -> None:
    """Empty the system's cache of the files; what other processes have mapped stays."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not yet on the disk would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_seconds(paths: Sequence[Path]) -> float:
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure_start(flags: Sequence[str]) -> Start:
    start = time.perf_counter()
    with local_server(*flags):
        seconds = time.perf_counter() - start
        worker = max(worker_pids(), key=lambda pid: memory(pid, "VmRSS"))
        return Start(seconds, memory(worker, "VmRSS"), memory(worker, "VmHWM"))


def measure(config: EngineConfig, weights: Sequence[Path], cached: bool, rounds: int) -> str:
    """A line of the table."""
    starts, reads = [], []
    for _ in range(rounds):
        if not cached:
            forget(weights)
        reads.append(read_seconds(weights))
        if not cached:
            forget(weights)
        starts.append(measure_start(server_flags(config)))
    ready, reading = median(start.seconds for start in starts), median(reads)
    resident, most = max(start.resident for start in starts), max(start.most for start in starts)
    packed, title = weight_bytes(config), f"{config.quantization}, from {'cache' if cached else 'disk'}"
    return (
        f"{title:18}{ready:8.2f}{reading:10.2f}"
        f"{ready - reading:8.2f}{resident / MIB:8,.0f}{most / MIB:8,.0f}{packed / MIB:9,.0f}"
        f"{(resident - packed) / MIB:8,.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of random weights, or a directory")
    parser.add_argument("--quantization", nargs="+", choices=("none", "int8", "int4"), default=["none", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=work_directory())
    options = parser.parse_args()
    try:
        model, label = locate(options.model, options.work_dir)
        weights = sorted(model.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
        print(f"{label}, {size / MIB:,.0f} MiB of files, {_C.isa()}; medians of {options.rounds}")
        print(f"asked: ready {ASKED_SECONDS} s over reading the files, {ASKED_MIB} MiB over the weights")
        print(f"{'':18}{'ready, s':>8}{'reading':>10}{'over':>8}{'MiB':>8}{'most':>8}{'weights':>9}{'over':>8}")
        for quantization in options.quantization:
            config = EngineConfig(
                model=str(model), embedding_model="off", quantization=quantization, max_model_len=Workload().context
            )
            for cached in (False, True):
                print(measure(config, weights, cached, options.rounds), flush=True)
    except (MillraceError, ValueError, OSError) as error:
        parser.exit(1, f"startup: {error}\n")


if __name__ == "__main__":
    main()

"""The engine against the machine's roof and against other engines: `python -m millrace.bench.engine`.

On a checkpoint of random weights, or on one of yours, for each width of weights: prefill, decode at several batch
sizes and a mixed load, all greedy; here, with every peer that is installed, and what the machine allows at most, in
one run. How fast memory gives the weights is measured before and after each of our batches, on the very pages that
they lie on: it changes where others share the memory, and some of it may be far from the processor. For the same reason
one request is decoded several times by every engine, and the best counts. Peers are installed
by `python -m millrace.bench.peers`, or by naming them with --peers.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from millrace.bench.checkpoints import SHAPES, checkpoint, label_of, work_directory, write_json
from millrace.bench.comparison import OURS, Comparison, Result, reused_peers
from millrace.bench.limits import WIDTHS, Work, limits
from millrace.bench.ours import measure_ours
from millrace.bench.peers.base import PeerError
from millrace.bench.peers.choice import chosen, names
from millrace.bench.peers.registry import PEERS
from millrace.bench.roof import isas_up_to, measure_roof, roof_table
from millrace.bench.workload import Workload
from millrace.kernels import _C
from millrace.server.errors import MillraceError
from millrace.server.model.checkpoint import Checkpoint

QUICK = Workload(
    prefill=64, batches=(1, 4), decode_prompt=16, decode_output=8, requests=4, request_prompt=32, request_output=8,
    step_tokens=256, repeats=1, single_repeats=1,
)  # fmt: skip
Prepared = Mapping[tuple[str, str], Path | PeerError]  # by peer and width


def main() -> None:
    arguments = parse()
    out, progress = Console(width=120), Console(stderr=True, width=120, highlight=False)
    if arguments.isa:
        os.environ["MILLRACE_ISA"] = arguments.isa
    try:
        comparison = compare(arguments, progress)
    except (MillraceError, PeerError, ValueError, OSError) as error:
        sys.exit(f"bench: {' '.join(str(error).split())}")
    for table in comparison.tables():
        out.print(table)
    for line in comparison.errors():
        out.print(f"not measured: {line}", highlight=False)
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    file: Path = arguments.json or arguments.work_dir / "results" / f"engine-{comparison.label}-{now}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, comparison.to_json())
    out.print(f"all of it: {file}", highlight=False, soft_wrap=True)


def compare(arguments: argparse.Namespace, progress: Console) -> Comparison:
    """Everything is made before anything is measured; then one after the other."""
    work: Path = arguments.work_dir
    model, label = locate(arguments.model, work)
    asked = Work.of(Checkpoint.open(model).spec)
    workload, isa, threads = QUICK if arguments.quick else Workload(), _C.isa(), arguments.threads
    prepared = {} if arguments.reuse_peers else prepare(model, label, arguments, progress)
    seconds = 0.05 if arguments.quick else 0.5
    roof = measure_roof(threads, seconds)
    Console(width=120).print(roof_table(roof))
    results: list[Result] = []
    dram: dict[str, dict[int, float]] = {}
    if arguments.reference:
        reference = replace(measure_ours(model, "float32", threads, workload, {}, seconds), engine="reference")
        results += [replace(reference, width=width) for width in arguments.widths]
    for width in arguments.widths:
        rates = dram[width] = {}
        measures = {OURS: partial(measure_ours, model, width, threads, workload, rates, seconds)}
        for (name, of), found in prepared.items():
            if of == width:
                measures[name] = partial(measure_peer, name, width, found, threads, isa, workload, work)
        for name, measure in measures.items():
            start = time.perf_counter()
            results.append(measure())
            progress.print(f"{name} {width}: {time.perf_counter() - start:.0f} s {results[-1].error or ''}")
    isas = isas_up_to(isa)
    comparison = Comparison(
        label=label,
        threads=threads,
        isa=isa,
        workload=workload,
        roof=roof,
        dram=dram,
        limits={width: limits(asked, roof, width, isas, workload, dram[width]) for width in dram},
        versions={name: PEERS[name].version(work) for name in sorted({name for name, _ in prepared})},
        results=results,
    )
    return reused_peers(comparison, arguments.reuse_peers) if arguments.reuse_peers else comparison


def measure_peer(
    name: str, width: str, model: Path | PeerError, threads: int, isa: str, workload: Workload, work: Path
) -> Result:
    """`model`: the peer's form of the checkpoint, or why there is none."""
    try:
        if isinstance(model, PeerError):
            raise model
        if isa != _C.available_isas()[-1] and isa not in PEERS[name].isas:
            raise PeerError(f"cannot be held to {isa}")
        return Result(name, width, PEERS[name].run(model, width, threads, isa, workload, work))
    except PeerError as error:
        return Result(name, width, error=str(error))


def locate(model: str, work: Path) -> tuple[Path, str]:
    """The checkpoint of a shape or a directory, and what to call it."""
    if model in SHAPES:
        return checkpoint(model, work), model
    directory = Path(model).resolve()
    return directory, label_of(directory)


def prepare(model: Path, label: str, arguments: argparse.Namespace, progress: Console) -> Prepared:
    """Install the peers that were asked for by name, and convert the checkpoint for each."""
    work: Path = arguments.work_dir
    prepared: dict[tuple[str, str], Path | PeerError] = {}
    for name in chosen(arguments.peers, work, progress.print):
        peer = PEERS[name]
        for width in (width for width in arguments.widths if width in peer.widths):
            try:
                prepared[name, width] = peer.convert(model, label, width, work)
            except PeerError as error:
                prepared[name, width] = error
    return prepared


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cpus = len(os.sched_getaffinity(0))

    parser.add_argument("--model", default="llama-3.2-1b", help=f"{', '.join(SHAPES)} or a directory; %(default)s")
    parser.add_argument(
        "--widths", type=names(list(WIDTHS)), default=["bf16", "int8", "int4"], help=f"of {','.join(WIDTHS)}"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--peers", type=names(list(PEERS)), help=f"of {','.join(PEERS)}; default: those installed")
    chosen.add_argument("--only", choices=["ours"], help="no peers")
    chosen.add_argument("--reuse-peers", type=Path, metavar="JSON", help="what peers did in an earlier run")
    parser.add_argument("--reference", action="store_true", help="beside the reference executor in float32 PyTorch")
    parser.add_argument("--threads", type=int, default=cpus, help="%(default)s")
    parser.add_argument("--isa", help="as MILLRACE_ISA; peers that cannot be held to it are left out")
    parser.add_argument("--quick", action="store_true", help="little work: a look whether everything runs")
    parser.add_argument("--work-dir", type=Path, default=work_directory(), help="%(default)s")
    parser.add_argument("--json", type=Path, help="where to write; default: results in the work directory")
    arguments = parser.parse_args()
    arguments.work_dir = arguments.work_dir.resolve()
    if arguments.only:
        arguments.peers = []
    return arguments


if __name__ == "__main__":
    main()

"""What a run of the engine's bench found: as tables, ratios first, and as JSON."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from millrace.bench.roof import Roof
from millrace.bench.workload import Speeds, Workload
from millrace.kernels import _C

OURS = "millrace"


@dataclass(frozen=True, slots=True)
class Result:
    """`error`, one line, where there are no speeds. `reused`: measured in an earlier run."""

    engine: str
    width: str
    speeds: Speeds = field(default_factory=Speeds)
    error: str | None = None
    load_seconds: float | None = None
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"speeds": self.speeds.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Result":
        return cls(**{**values, "speeds": Speeds.from_json(values["speeds"])})


@dataclass(frozen=True, slots=True)
class Comparison:
    """`label`: of the model. `versions`: of the peers. By width: `limits`, and `dram`, bytes per second
    at which memory gave our weights beside each batch."""

    label: str
    threads: int
    isa: str
    workload: Workload
    roof: Roof
    dram: Mapping[str, Mapping[int, float]]
    limits: Mapping[str, Speeds]
    versions: Mapping[str, str]
    results: Sequence[Result]

    def to_json(self) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "model": self.label,
            "threads": self.threads,
            "isa": self.isa,
            "workload": json.loads(self.workload.to_json()),
            "roof": asdict(self.roof),
            "dram": {width: dict(rates) for width, rates in self.dram.items()},
            "limits": {width: speeds.to_json() for width, speeds in self.limits.items()},
            "versions": dict(self.versions),
            "results": [result.to_json() for result in self.results],
        }

    def tables(self) -> Iterator[Table]:
        for width in self.limits:
            yield self._table(width, [result for result in self.results if result.width == width])

    def errors(self) -> Iterator[str]:
        for result in self.results:
            if result.error:
                yield f"{result.engine} {result.width}: {result.error}"

    def _table(self, width: str, results: Sequence[Result]) -> Table:
        rates = ", ".join(f"{rate / 1e9:.1f}" for rate in self.dram[width].values())
        memory = f"; memory at {rates} GB/s" if rates else ""
        title = f"{self.label}, {width}, {self.threads} threads, {self.isa}; tokens per second{memory}"
        table = Table(title=title, title_justify="left")
        peers = [result for result in results if result.engine != OURS and not result.error]
        names = [f"{result.engine}{' (reused)' if result.reused else ''}" for result in peers]
        table.add_column("work")
        for name in ("of limit", "of best peer", OURS, *names, "limit"):
            table.add_column(name, justify="right")
        ours = next((result.speeds for result in results if result.engine == OURS), Speeds())
        for title, read in works(self.workload):
            own, others, limit = read(ours), [read(peer.speeds) for peer in peers], read(self.limits[width])
            best = max((other for other in others if other), default=None)
            ratios = (ratio(own, limit, "{:.0%}"), ratio(own, best, "{:.2f}x"))
            table.add_row(title, *ratios, *(number(speed) for speed in (own, *others, limit)))
        return table


def reused_peers(comparison: Comparison, file: Path) -> Comparison:
    """Add what the peers did in an earlier run. ValueError if that was other work, or no run at all."""
    try:
        earlier = json.loads(file.read_text())
        own = comparison.to_json()
        for name in ("model", "threads", "isa", "workload", "machine"):
            if earlier[name] != own[name]:
                raise ValueError(f"{file}: {name} was {earlier[name]}, now it is {own[name]}")
        found = [Result.from_json(values) for values in earlier["results"] if values["engine"] != OURS]
        versions = dict(earlier["versions"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: is no result of this bench: {error}") from None
    reused = [replace(result, reused=True) for result in found if result.width in comparison.limits]
    return replace(comparison, versions=versions, results=[*comparison.results, *reused])


def works(workload: Workload) -> Iterator[tuple[str, Callable[[Speeds], float | None]]]:
    """The rows of a table: a title, and how to read its number."""
    yield f"prefill {workload.prefill}", lambda speeds: speeds.prefill
    for batch in workload.batches:
        yield f"decode, batch {batch}", partial(decode_speed, batch)
    mixed = f"{workload.requests} x ({workload.request_prompt} + {workload.request_output}), output"
    yield mixed, lambda speeds: speeds.mixed


def decode_speed(batch: int, speeds: Speeds) -> float | None:
    return speeds.decode.get(batch)


def ratio(a: float | None, b: float | None, form: str) -> str:
    return form.format(a / b) if a and b else "-"


def number(speed: float | None) -> str:
    if not speed:
        return "-"
    return f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}"


def commit() -> str:
    """Of the source tree, with a plus where it was changed; empty outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isas": _C.available_isas(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
    }

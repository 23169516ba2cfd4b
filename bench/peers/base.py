"""What the bench asks of another engine. Only the standard library: runners import it in their own environments."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.bench.workload import Meter, Speeds, Stepper, Workload

BENCH = Path(__file__).parent.parent
RUN_TIMEOUT = 1800.0  # seconds
SPEEDS = "speeds: "  # what the line of a runner begins with: libraries write to the same place


class PeerError(Exception):
    """A peer could not be installed or run; one line that says why."""


class Peer(ABC):
    """`work`: the directory that holds environments and converted checkpoints. Widths: bf16, int8, int4.

    `isas`: instruction sets that it can be held to; else it takes the best of the machine.
    """

    name: str
    widths: tuple[str, ...]
    isas: tuple[str, ...] = ()

    @abstractmethod
    def install(self, work: Path) -> None:
        """Raises PeerError."""

    @abstractmethod
    def version(self, work: Path) -> str:
        """Of what is installed, as the table names it."""

    @abstractmethod
    def convert(self, checkpoint: Path, label: str, width: str, work: Path) -> Path:
        """Make the peer's form of the checkpoint, unless one of that label is there. Raises PeerError."""

    @abstractmethod
    def run(self, model: Path, width: str, threads: int, isa: str, workload: Workload, work: Path) -> Speeds:
        """Measure it in a process of its own; `model` is what `convert` returned. Raises PeerError."""

    def environment(self, work: Path) -> Path:
        return work / "venvs" / self.name

    def installed(self, work: Path) -> bool:
        return (self.environment(work) / "complete").is_file()

    def python(self, work: Path) -> Path:
        return self.environment(work) / "bin" / "python"

    def make_environment(self, work: Path) -> None:
        shutil.rmtree(self.environment(work), ignore_errors=True)
        call([sys.executable, "-m", "venv", str(self.environment(work))], work)

    def pip(self, work: Path, *arguments: str) -> None:
        call([str(self.python(work)), "-m", "pip", "--disable-pip-version-check", "-q", *arguments], work)

    def finish_environment(self, work: Path) -> None:
        """The mark of an installation that went through."""
        (self.environment(work) / "complete").touch()

    def run_stepper(
        self, model: Path, threads: int, workload: Workload, work: Path, variables: Mapping[str, str]
    ) -> Speeds:
        """Run `serve_stepper` of the peer's own module in its environment."""
        module = type(self).__module__
        with tempfile.TemporaryDirectory() as directory:
            # The bench alone, not what is installed beside it: the peer has other versions of the same libraries.
            (Path(directory) / "millrace").mkdir()
            (Path(directory) / "millrace" / "bench").symlink_to(BENCH)
            command = [str(self.python(work)), "-m", module, str(model), str(threads), workload.to_json()]
            own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": directory, "HF_HUB_OFFLINE": "1"}
            output = call(command, Path(directory), own | dict(variables))
        lines = [line for line in output.splitlines() if line.startswith(SPEEDS)]
        if not lines:
            raise PeerError(f"{self.name} printed no speeds: {last_line(output)}")
        return Speeds.from_json(json.loads(lines[-1].removeprefix(SPEEDS)))


def serve_stepper(make: Any) -> None:
    """The main function of a runner: `make(model, threads, workload)` returns its Stepper."""
    model, threads, text = sys.argv[1:]
    workload = Workload.from_json(text)
    stepper: Stepper = make(Path(model), int(threads), workload)
    print(SPEEDS + json.dumps(Meter(stepper).measure(workload).to_json()), flush=True)


def call(command: Sequence[str], directory: Path, variables: Mapping[str, str] | None = None) -> str:
    """The standard output of a command. PeerError with the last line of its error output if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"{Path(command[0]).name}: {error}") from None
    if done.returncode != 0:
        reason = last_line(done.stderr) or last_line(done.stdout)
        raise PeerError(f"`{shown(command)}` ended with {done.returncode}: {reason}")
    return done.stdout


def shown(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])[:200]


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""

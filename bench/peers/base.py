"""What the bench asks of another engine. Only the standard library: runners import it in their own environments."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.bench.peers.runner import ANSWER, QUESTION
from millrace.bench.workload import Speeds, Workload

BENCH = Path(__file__).parent.parent
RECIPE = "2"  # what `install` makes; another number whenever that changes
RUN_TIMEOUT = 1800.0  # seconds
Windows = Sequence[Sequence[int]]  # token ids, at least two in each


class PeerError(Exception):
    """A peer could not be installed or run; one line that says why."""


class Peer(ABC):
    """`work`: the directory that holds environments and converted checkpoints. Widths: bf16, int8, int4.

    `isas`: instruction sets that it can be held to; else it takes the best of the machine.
    `int4_group`: how many inputs share a scale at int4; None: it has no int4.
    """

    name: str
    widths: tuple[str, ...]
    isas: tuple[str, ...] = ()
    int4_group: int | None = None

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

    @abstractmethod
    def losses(self, model: Path, width: str, threads: int, windows: Windows, work: Path) -> list[float]:
        """For each window the negative log likelihood of its tokens but the first, nats, by the peer's own defaults.

        Exactly the tokens given, each window alone, in a process of its own. Raises PeerError.
        """

    def environment(self, work: Path) -> Path:
        return work / "venvs" / self.name

    def installed(self, work: Path) -> bool:
        """By the recipe of today: an environment of an earlier one lacks something."""
        mark = self.environment(work) / "complete"
        return mark.is_file() and mark.read_text() == RECIPE

    def python(self, work: Path) -> Path:
        return self.environment(work) / "bin" / "python"

    def make_environment(self, work: Path) -> None:
        shutil.rmtree(self.environment(work), ignore_errors=True)
        call([sys.executable, "-m", "venv", str(self.environment(work))], work)

    def pip(self, work: Path, *arguments: str) -> None:
        call([str(self.python(work)), "-m", "pip", "--disable-pip-version-check", "-q", *arguments], work)

    def finish_environment(self, work: Path) -> None:
        """The mark of an installation that went through."""
        (self.environment(work) / "complete").write_text(RECIPE)

    def run_stepper(
        self, model: Path, threads: int, workload: Workload, work: Path, variables: Mapping[str, str]
    ) -> Speeds:
        return Speeds.from_json(self.ask("speeds", workload.to_json(), model, threads, work, variables))

    def run_scorer(
        self, model: Path, threads: int, windows: Windows, work: Path, variables: Mapping[str, str]
    ) -> list[float]:
        losses: list[float] = self.ask("losses", windows, model, threads, work, variables)
        if len(losses) != len(windows) or not all(map(math.isfinite, losses)):
            raise PeerError(f"{self.name} has no finite loss for each window")
        return losses

    def ask(
        self, task: str, question: object, model: Path, threads: int, work: Path, variables: Mapping[str, str]
    ) -> Any:
        """The answer of the peer's own module to a task that it serves, in its environment. Raises PeerError."""
        with tempfile.TemporaryDirectory() as directory:
            here = Path(directory)
            # The bench alone, not what is installed beside it: the peer has other versions of the same libraries.
            (here / "millrace").mkdir()
            (here / "millrace" / "bench").symlink_to(BENCH)
            (here / QUESTION).write_text(json.dumps(question))
            own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | dict(variables)
            own["PYTHONPATH"] = os.pathsep.join(filter(None, (directory, variables.get("PYTHONPATH"))))
            command = [str(self.python(work)), "-m", type(self).__module__, task, str(model), str(threads)]
            output = call(command, here, own)
            if not (here / ANSWER).is_file():
                raise PeerError(f"{self.name} gave no {task}: {last_line(output)}")
            return json.loads((here / ANSWER).read_text())


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

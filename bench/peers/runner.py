"""What runs in a peer's own environment: the other side of `Peer.ask`.

A runner is the peer's module, run as a program: `python -m MODULE TASK MODEL THREADS`, in a directory that holds the
question. The answer goes into a file beside it, since libraries write to every stream.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from millrace.bench.workload import Meter, Stepper, Workload

QUESTION, ANSWER = "question.json", "answer.json"
Task = Callable[[Path, int, Any], Any]  # of the model, the number of threads and the question


def serve(**tasks: Task) -> None:
    """The main function of a runner; questions and answers are what json can write."""
    task, model, threads = sys.argv[1:]
    directory = Path.cwd()
    found = tasks[task](Path(model), int(threads), json.loads((directory / QUESTION).read_text()))
    (directory / ANSWER).write_text(json.dumps(found))


def timed(make: Callable[[Path, int, Workload], Stepper]) -> Task:
    """The task `speeds`; the question is a Workload."""

    def speeds(model: Path, threads: int, question: str) -> dict[str, Any]:
        workload = Workload.from_json(question)
        return Meter(make(model, threads, workload)).measure(workload).to_json()

    return speeds

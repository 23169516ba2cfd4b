"""Runs an engine on a thread of its own, so that a step of seconds holds up nothing else in the process."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from millrace.server.engine.engine import StepOutput
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.errors import RequestError, StartupError
from millrace.server.types import BackendInfo, Sampling

T = TypeVar("T")

WARM_UP = 0  # the sequence id of the warm-up; callers count from 1


class StepEngine(Protocol):
    """What the thread needs of an engine; `millrace.server.engine.engine.Engine` is the one that serves."""

    info: BackendInfo

    @property
    def has_work(self) -> bool: ...
    @property
    def progress(self) -> int: ...
    def submit(self, *requests: SequenceRequest) -> None: ...
    def cancel(self, sequence_id: int) -> None: ...
    def step(self) -> StepOutput: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Report:
    """One turn of the thread: what became of the submitted sequences, then at most one step."""

    admitted: list[int] = field(default_factory=list)
    rejected: list[tuple[int, RequestError]] = field(default_factory=list)
    output: StepOutput | None = None


@dataclass(frozen=True, slots=True)
class Pulse:
    """Signs of life. While `busy`, a `counter` that stands still means a hang."""

    counter: int = 0
    busy: bool = False
    step: int = 0


class EngineThread:
    """Loads an engine, warms it up, then steps it as long as there is work and sleeps while there is none.

    Every method belongs to the event loop. `deliver` runs on the loop, once for each turn of the thread.
    `ready` resolves after the warm-up, or raises what loading raised; `ended` resolves after `close`, or
    raises what the engine raised, after which the thread is gone.
    """

    def __init__(self, load: Callable[[], StepEngine]):
        self._load = load
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[BackendInfo] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._deliver: Callable[[Report], None] = lambda report: None
        self._wake = threading.Condition()
        self._commands: deque[tuple[SequenceRequest, ...] | int] = deque()
        self._closing = False
        self._busy = True
        self._step = 0
        self._engine: StepEngine | None = None
        # A daemon: loading cannot be interrupted, and must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, deliver: Callable[[Report], None]) -> None:
        self._deliver = deliver
        self._thread.start()

    def submit(self, sequences: Sequence[SequenceRequest]) -> None:
        """Queue the choices of one request: all of them are admitted, or none."""
        self._send([tuple(sequences)])

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """End sequences before the next step. Unknown ones are ignored."""
        self._send(sequence_ids)

    def close(self) -> None:
        """End after the present step. Idempotent; `ended` tells when."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def pulse(self) -> Pulse:
        return Pulse(self._engine.progress if self._engine else 0, self._busy, self._step)

    def _send(self, commands: Sequence[tuple[SequenceRequest, ...] | int]) -> None:
        with self._wake:
            self._commands.extend(commands)
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._engine = engine = self._load()
            warm_up(engine)
            self._tell(resolve, self.ready, engine.info)
            while (commands := self._next_commands(engine)) is not None:
                report = self._turn(engine, commands)
                if report.admitted or report.rejected or report.output:
                    self._tell(self._deliver, report)
            engine.close()
            self._tell(resolve, self.ended, None)
        except BaseException as error:
            self._tell(fail, self.ended if self.ready.done() else self.ready, error)

    def _next_commands(self, engine: StepEngine) -> list[tuple[SequenceRequest, ...] | int] | None:
        """Wait until there is something to do; None: close."""
        if not self._commands and not engine.has_work:
            engine.check()
        with self._wake:
            while not (self._closing or self._commands or engine.has_work):
                self._busy = False
                self._wake.wait()
            self._busy = True
            commands = list(self._commands)
            self._commands.clear()
            return None if self._closing else commands

    def _turn(self, engine: StepEngine, commands: list[tuple[SequenceRequest, ...] | int]) -> Report:
        report = Report()
        for command in commands:
            if isinstance(command, int):
                engine.cancel(command)
            else:
                admit(engine, command, report)
        # After a cancel there may be nothing to run, but what it freed is news.
        if engine.has_work or any(isinstance(command, int) for command in commands):
            report.output = engine.step()
            self._step = report.output.step
        return report

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *args)


def admit(engine: StepEngine, sequences: tuple[SequenceRequest, ...], report: Report) -> None:
    """Submit the choices of a request; they are admitted or rejected together."""
    try:
        engine.submit(*sequences)
    except RequestError as error:
        report.rejected += [(sequence.sequence_id, error) for sequence in sequences]
    else:
        report.admitted += [sequence.sequence_id for sequence in sequences]


def warm_up(engine: StepEngine) -> None:
    """Generate one token, so that whatever the first step compiles or allocates is not a client's wait."""
    if engine.info.max_model_len < 2:
        return
    greedy = Sampling(temperature=0)
    try:
        engine.submit(SequenceRequest(WARM_UP, "warm-up", "", (0,), greedy, 0, max_output_tokens=1))
    except RequestError as error:
        raise StartupError(f"the engine refused its warm-up request: {error}") from error
    while engine.has_work:
        for finished in engine.step().finished:
            if finished.error:
                raise StartupError(f"the warm-up failed: {finished.error}") from finished.error


def resolve(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)

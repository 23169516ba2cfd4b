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
from millrace.server.engine.texts import TextRequest
from millrace.server.errors import RequestError, StartupError
from millrace.server.types import BackendInfo, EmbedderInfo, Sampling

T = TypeVar("T")

AHEAD = 2  # steps that may run before a watcher has seen what came of the one before them
PATIENCE = 0.1  # seconds that a step waits for watchers: one that is stuck must not stop everybody
WARM_UP_TOKENS = 32
WARM_UP = 0  # the sequence id of the warm-up; callers count from 1


class StepEngine(Protocol):
    """What the thread needs of an engine; `millrace.server.engine.combined.CombinedEngine` is the one that serves."""

    info: BackendInfo

    @property
    def embedder(self) -> EmbedderInfo | None: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def progress(self) -> int: ...
    def submit(self, *requests: SequenceRequest) -> None: ...
    def embed(self, *texts: TextRequest) -> None: ...
    def cancel(self, sequence_id: int) -> None: ...
    def step(self) -> StepOutput: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Order:
    """From the event loop to the thread. Each of the first two is one request: all of it is admitted, or none."""

    sequences: tuple[SequenceRequest, ...] = ()
    texts: tuple[TextRequest, ...] = ()
    cancels: tuple[int, ...] = ()


@dataclass(slots=True)
class Report:
    """One turn of the thread: what became of what was submitted, then at most one step of each engine."""

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
        self.ready: asyncio.Future[tuple[BackendInfo, EmbedderInfo | None]] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._deliver: Callable[[Report], None] = lambda report: None
        self._wake = threading.Condition()
        self._orders: deque[Order] = deque()
        self._seen: dict[object, int] = {}  # watcher -> the last step it has acted on
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
        """Queue the choices of one request, all of them or none. A refusal is delivered at once, whatever runs."""
        if not self.ready.done() or self._engine is None:
            self._send(Order(sequences=tuple(sequences)))
            return
        report = Report()
        admit(self._engine.submit, sequences, report)
        if report.rejected:
            self._deliver(report)
        with self._wake:
            self._wake.notify()

    def embed(self, texts: Sequence[TextRequest]) -> None:
        """Queue the texts of one request: all of them are admitted, or none."""
        self._send(Order(texts=tuple(texts)))

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """End sequences, and drop texts, before the next step. Unknown ones are ignored."""
        self._send(Order(cancels=tuple(sequence_ids)))

    def watch(self, watcher: object) -> None:
        """From now on, until `unwatch`, no step begins more than AHEAD after the last that `watcher` has seen."""
        with self._wake:
            self._seen.setdefault(watcher, self._step)

    def see(self, watcher: object, step: int) -> None:
        with self._wake:
            if watcher in self._seen:
                self._seen[watcher] = step
                self._wake.notify()

    def unwatch(self, watcher: object) -> None:
        """Idempotent."""
        with self._wake:
            if self._seen.pop(watcher, None) is not None:
                self._wake.notify()

    def close(self) -> None:
        """End after the present step. Idempotent; `ended` tells when."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def pulse(self) -> Pulse:
        return Pulse(self._engine.progress if self._engine else 0, self._busy, self._step)

    def _send(self, order: Order) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._engine = engine = self._load()
            warm_up(engine)
            self._tell(resolve, self.ready, (engine.info, engine.embedder))
            while (orders := self._next_orders(engine)) is not None:
                report = self._turn(engine, orders)
                if report.rejected or report.output:
                    self._tell(self._deliver, report)
            engine.close()
            self._tell(resolve, self.ended, None)
        except BaseException as error:
            self._tell(fail, self.ended if self.ready.done() else self.ready, error)

    def _next_orders(self, engine: StepEngine) -> list[Order] | None:
        """Wait until there is something to do; None: close."""
        if not self._orders and not engine.has_work:
            engine.check()
        with self._wake:
            while not (self._closing or self._orders or engine.has_work):
                self._busy = False
                self._wake.wait()
            self._busy = True
            self._wake.wait_for(self._is_seen, PATIENCE)
            orders = list(self._orders)
            self._orders.clear()
            return None if self._closing else orders

    def _is_seen(self) -> bool:
        return self._closing or self._step - min(self._seen.values(), default=self._step) <= AHEAD

    def _turn(self, engine: StepEngine, orders: list[Order]) -> Report:
        report = Report()
        for order in orders:
            if order.sequences:
                admit(engine.submit, order.sequences, report)
            if order.texts:
                admit(engine.embed, order.texts, report)
            for sequence_id in order.cancels:
                engine.cancel(sequence_id)
        # After a cancel there may be nothing to run, but what it freed is news.
        if engine.has_work or any(order.cancels for order in orders):
            report.output = engine.step()
            self._step = report.output.step
        return report

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *args)


def admit(submit: Callable[..., None], parts: Sequence[SequenceRequest | TextRequest], report: Report) -> None:
    """Submit the choices or the texts of a request; they are admitted or rejected together."""
    try:
        submit(*parts)
    except RequestError as error:
        report.rejected += [(part.sequence_id, error) for part in parts]


def warm_up(engine: StepEngine) -> None:
    """Generate and embed one token, so that what the first steps compile or allocate is not a client's wait."""
    try:
        if engine.info.max_model_len > 1:
            greedy = Sampling(temperature=0)
            prompt = (0,) * min(WARM_UP_TOKENS, engine.info.max_model_len - 1)
            engine.submit(SequenceRequest(WARM_UP, "warm-up", "", prompt, greedy, 0, max_output_tokens=1))
        if engine.embedder is not None:
            engine.embed(TextRequest(WARM_UP, "warm-up", "", (0,)))
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

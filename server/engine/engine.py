"""The engine: sequences in, tokens out, one step at a time. One thread calls it, another one may submit."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from millrace.server.config import EngineConfig
from millrace.server.engine import loops
from millrace.server.engine.batch import BatchPacker
from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Limits, Plan
from millrace.server.engine.results import checked_result, failed_row, row_tokens, sequence_tokens
from millrace.server.engine.row import Row
from millrace.server.engine.scheduler import Scheduler
from millrace.server.engine.sequence import SequenceFinished, SequenceRequest, SequenceToken, Status
from millrace.server.engine.step_time import UNLIMITED
from millrace.server.engine.texts import TextVector
from millrace.server.engine.validation import checked_request
from millrace.server.errors import InternalError
from millrace.server.model.executors.base import Executor, StepResult, Ticket
from millrace.server.types import BackendInfo, EngineStats

log = logging.getLogger(__name__)

HOPELESS = 8  # steps in a row that failed with every sequence in them: the fault is not the sequences'


@dataclass(slots=True)
class StepOutput:
    """News of one step. A token of a sequence comes before, or together with, its finish."""

    step: int
    started: list[int] = field(default_factory=list)  # sequences that run for the first time
    tokens: list[SequenceToken] = field(default_factory=list)
    finished: list[SequenceFinished] = field(default_factory=list)
    embedded: list[TextVector] = field(default_factory=list)
    stats: EngineStats = field(default_factory=EngineStats)


@dataclass(frozen=True, slots=True)
class Flight:
    """A submitted step; without a ticket it never took off and `error` says why."""

    plan: Plan
    ticket: Ticket | None
    error: Exception | None = None
    launched_us: int = 0


class Engine:
    """Runs sequences on an executor, which it owns from now on.

    With `steps_in_flight` = 2 the executor has its next step before the engine has read the last one; a
    sequence that turns out to have ended then costs one row of surplus work.
    """

    def __init__(
        self,
        executor: Executor,
        info: BackendInfo,
        config: EngineConfig,
        steps_in_flight: int = 1,
        clock_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ):
        if steps_in_flight < 1:
            raise ValueError(f"steps_in_flight is {steps_in_flight}, at least 1 is needed")
        layout = executor.kv_layout
        limits = Limits(
            max_model_len=info.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            prefix_caching=config.prefix_caching,
            max_queued_of_tenant=config.max_queued_requests_per_tenant or UNLIMITED,
            max_running_of_tenant=config.max_num_seqs_per_tenant or UNLIMITED,
            max_step_us=round(1e6 * config.max_step_time) or None,
            ageing_us=round(1e6 * config.priority_ageing),
        )
        self.info = info
        self._executor = executor
        self._depth = steps_in_flight
        self._clock_us = clock_us
        self._scheduler = Scheduler(limits, BlockPool(layout.num_blocks, layout.block_size))
        self._packer = BatchPacker(limits.lanes, layout.block_size, info.vocab_size)
        self._flights: deque[Flight] = deque()
        self._steps = 0
        self._hopeless = 0
        self._collected_us = 0
        self._lock = threading.Lock()  # of the scheduler, while it is decided and not while it is computed

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._flights)

    @property
    def progress(self) -> int:
        """Grows with every layer and every step; any thread may read it."""
        return self._executor.progress + self._steps

    def submit(self, *requests: SequenceRequest) -> None:
        """Queue the choices of one request, all of them or none. Any thread may: it waits for no step.

        Raises InvalidRequest, PromptTooLong, ExceedsKVCapacity, QueueFull, TenantQueueFull or DeadlineUnattainable.
        """
        checked = [checked_request(request, self.info.vocab_size) for request in requests]
        with self._lock:
            self._scheduler.submit(*checked, now_us=self._clock_us())

    def cancel(self, sequence_id: int) -> None:
        """End a sequence: it yields nothing more, not even a finish. An unknown one is ignored."""
        with self._lock:
            self._scheduler.cancel(sequence_id)

    def step(self) -> StepOutput:
        """Plan and submit a step, collect the oldest one in flight, and tell what is new.

        A step that fails is run again in halves until the culprits stand alone; they finish with an
        InternalError, the others go on. Raises what the executor raised once nothing succeeds any more.
        """
        started = self._clock_us()
        self._steps += 1
        output = StepOutput(self._steps)
        with self._lock:
            plan = self._scheduler.plan(started)
            output.finished += self._scheduler.take_ended()
        if plan is not None:
            output.started += self._announce(plan)
            self._flights.append(self._launch(plan, started))
        if self._flights and (plan is None or len(self._flights) >= self._depth):
            self._land(output)
        while self._flights and self._flights[-1].error:  # nothing may be planned on top of it
            self._land(output)
        output.stats = self._stats(plan, self._clock_us() - started)
        return output

    def check(self) -> None:
        """Raise AssertionError unless every invariant of scheduler and block pool holds."""
        with self._lock:
            self._scheduler.check()
            idle = not self.has_work
        if idle and self._scheduler.pool.free != self._scheduler.pool.total:
            raise AssertionError("blocks are held though nothing runs")

    def close(self) -> None:
        """Drop what is in flight and release the executor. Idempotent."""
        while self._flights:
            self._abandon(self._flights.popleft())
        self._executor.close()

    @staticmethod
    def _announce(plan: Plan) -> list[int]:
        fresh = [sequence for sequence in plan.admitted if not sequence.announced]
        for sequence in fresh:
            sequence.announced = True
        return [sequence.request.sequence_id for sequence in fresh]

    def _launch(self, plan: Plan, now_us: int) -> Flight:
        if plan.copies:
            self._executor.copy_blocks(plan.copies)
        for sequence in plan.admitted:
            self._packer.admit(sequence)
        for sequence in plan.grown:
            self._packer.grow(sequence)
        try:
            tickets = {flight.plan.step: flight.ticket for flight in self._flights if flight.ticket is not None}
            return Flight(plan, self._executor.submit(self._packer.pack(plan.rows, tickets)), launched_us=now_us)
        except Exception as error:
            return Flight(plan, None, error)

    def _land(self, output: StepOutput) -> None:
        """Collect the oldest step and commit it."""
        flight = self._flights.popleft()
        try:
            if flight.ticket is None:
                raise flight.error or AssertionError("a flight has a ticket or an error")
            result = checked_result(flight.plan.rows, self._executor.collect(flight.ticket))
        except Exception as error:
            log.exception("a step of %d rows failed; running its rows again in halves", len(flight.plan.rows))
            self._recover(flight.plan, error, output)
        else:
            self._hopeless = 0
            now_us = self._clock_us()
            with self._lock:
                self._scheduler.observe(flight.plan.work, now_us - max(flight.launched_us, self._collected_us))
            self._collected_us = now_us
            self._commit(flight.plan.step, flight.plan.rows, result, output)

    def _commit(self, step: int, rows: list[Row], result: StepResult, output: StepOutput) -> None:
        tokens = row_tokens(result)
        errors = {row: InternalError(f"the executor failed: {text}") for row, text in result.errors.items()}
        with self._lock:
            accepted, finished = self._scheduler.commit(step, rows, tokens, errors)
        output.tokens += sequence_tokens(rows, accepted, tokens, result)
        output.finished += finished
        self._packer.append(*loops.running_tokens(rows, accepted, tokens))
        for row, text in result.errors.items():
            log.error("request %s fails the executor: %s", rows[row].sequence.request.request_id, text)

    def _recover(self, plan: Plan, error: Exception, output: StepOutput) -> None:
        """Undo the steps after a failed one, which may build on it, and run its rows again."""
        with self._lock:
            for later in reversed(self._flights):
                self._scheduler.rollback(later.plan.step, later.plan.rows)
        while self._flights:
            self._abandon(self._flights.popleft())
        left = [row for row in plan.rows if row.sequence.status is not Status.RUNNING]
        with self._lock:
            self._scheduler.rollback(plan.step, left)
        again = [row._replace(source=None) for row in plan.rows if row.sequence.status is Status.RUNNING]
        if again:
            all_failed = self._isolate(plan.step, again, error, output) == len(again)
            self._hopeless = self._hopeless + 1 if all_failed else 0
        if self._hopeless == HOPELESS:
            raise error

    def _isolate(self, step: int, rows: list[Row], error: Exception, output: StepOutput) -> int:
        """Run each half of rows that failed together; returns how many of them fail even alone."""
        if len(rows) == 1:
            self._commit(step, rows, failed_row(error), output)
            return 1
        failed = 0
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            try:
                ticket = self._executor.submit(self._packer.pack(half, {}))
                result = checked_result(half, self._executor.collect(ticket))
            except Exception as cause:
                failed += self._isolate(step, half, cause, output)
            else:
                self._commit(step, half, result, output)
        return failed

    def _abandon(self, flight: Flight) -> None:
        """Wait for a step whose results no longer count."""
        try:
            if flight.ticket is not None:
                self._executor.collect(flight.ticket)
        except Exception:
            log.exception("a step that no longer counts failed")

    def _stats(self, plan: Plan | None, step_us: int) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            step=self._steps,
            running=scheduler.running,
            waiting=scheduler.waiting,
            waiting_tokens=scheduler.waiting_tokens,
            free_blocks=scheduler.pool.free,
            total_blocks=scheduler.pool.total,
            prefill_tokens=plan.prefill_tokens if plan else 0,
            decode_tokens=plan.decode_tokens if plan else 0,
            step_us=step_us,
            preemptions_total=scheduler.preemptions,
        )

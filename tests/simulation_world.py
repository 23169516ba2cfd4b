"""The production scheduler and block pool under a virtual clock, judged after every step."""

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from simulation_device import Device, Truth
from simulation_script import Script, write_script

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Limits, Plan, Row
from millrace.server.engine.queue import order_within
from millrace.server.engine.scheduler import Scheduler
from millrace.server.engine.sequence import Sequence, SequenceFinished, SequenceRequest, Status
from millrace.server.errors import DeadlineUnattainable, InternalError, QueueFull, RequestError
from millrace.server.types import CachePolicy, FinishReason, Priority, Sampling

LIVENESS_STEPS = 3000
PLANT = ("block_size", "blocks", "depth", "weights", "idle_tenants")  # of a setting, not limits of the scheduler


class World:
    """`run` executes a script and returns the hash of its trace; a violated invariant is an AssertionError."""

    def __init__(self, script: Script):
        self.script, setting = script, script.setting
        self.limits = Limits(**{name: value for name, value in setting.items() if name not in PLANT})
        self.pool = BlockPool(setting["blocks"], setting["block_size"])
        self.scheduler = Scheduler(self.limits, self.pool)
        self.scheduler.tenants.most_idle = setting["idle_tenants"]
        self.device = Device(setting["blocks"], setting["block_size"], self.limits.lanes)
        self.depth, self.now = setting["depth"], 0
        self.flights: deque[tuple[Plan, list[int]]] = deque()
        self.last: tuple[Plan, list[int]] | None = None  # landed
        self.held: list[int] = []  # blocks in transfer
        self.requests: dict[int, SequenceRequest] = {}
        self.truths: dict[int, Truth] = {}
        self.arrived: dict[int, int] = {}
        self.output: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.ran: set[int] = set()
        self.charged: dict[int, int] = {}  # first tokens of a sequence, by arrival, that were computed before
        self.counts: dict[str, int] = {}
        self.trace = hashlib.sha256()
        self.lose: int | None = None
        self.fail: int | None = None

    def run(self) -> str:
        for name, *values in self.script.events:
            getattr(self, f"_{name}")(*values)
        self._unhold()
        self.lose = self.fail = None
        for _ in range(LIVENESS_STEPS):
            if not self.scheduler.has_work and not self.flights:
                break
            self._step(1)
        else:
            raise AssertionError(f"no end in {LIVENESS_STEPS} steps: {self.scheduler._live}")
        self._judge_end()
        return self.trace.hexdigest()

    def _arrive(self, number: int, asked: dict[str, Any]) -> None:
        base = 10 * number
        requests = [self._request(base + choice, choice, asked) for choice in range(asked["n"])]
        truths = [Truth(request, self.limits.max_model_len) for request in requests]
        given = [truth.output[: min(asked.get("given", 0), len(truth.output) - 1)] for truth in truths]
        resumes = asked.get("given", 0) % 2 == 1  # else a client goes on with it
        requests = [
            replace(request, output_ids=tokens, resumes=resumes)
            for request, tokens in zip(requests, given, strict=True)
        ]
        refused = self._submit(requests)
        if refused is not None:
            self._count(type(refused).__name__)
            self._note(("rejected", base, type(refused).__name__))
            assert not isinstance(refused, QueueFull | DeadlineUnattainable) or (refused.retry_after or 0) > 0
            return
        for request, truth in zip(requests, truths, strict=True):
            self.requests[request.sequence_id] = request
            self.truths[request.sequence_id] = truth
            self.arrived[request.sequence_id] = self.scheduler._now_us
            self.output[request.sequence_id] = list(request.output_ids)

    def _submit(self, requests: list[SequenceRequest]) -> RequestError | None:
        scheduler = self.scheduler
        before = scheduler.waiting, scheduler.waiting_tokens
        try:
            scheduler.submit(*requests, now_us=self.now)
        except RequestError as error:
            refused = error
        else:
            refused = None
        self._check()
        assert refused is None or before == (scheduler.waiting, scheduler.waiting_tokens), "all or none"
        return refused

    def _request(self, sequence_id: int, choice: int, asked: dict[str, Any]) -> SequenceRequest:
        setting = self.script.setting
        return SequenceRequest(
            sequence_id,
            f"request-{sequence_id}",
            f"tenant-{asked['tenant']}",
            asked["prompt"],
            Sampling(seed=asked["seed"], repetition_penalty=1.5 if asked["history"] else 1.0),
            choice,
            max_output_tokens=asked["max_output_tokens"],
            min_output_tokens=asked["min_output_tokens"],
            stop_token_ids=frozenset(asked["stop_token_ids"]),
            priority=Priority(asked["priority"]),
            tenant_weight=setting["weights"][asked["tenant"]],
            queue_timeout_us=asked["queue_timeout_us"],
            time_limit_us=asked["time_limit_us"],
            deadline_us=asked["deadline_us"],
            cache=CachePolicy(asked["read"], asked["write"], asked["salt"]),
        )

    def _cancel(self, number: int, choice: int) -> None:
        sequence_id = 10 * number + choice
        if sequence_id not in self.requests:
            return
        self.scheduler.cancel(sequence_id)
        if sequence_id not in self.ended:
            self.ended[sequence_id] = "cancelled"
            self._count("cancelled")
        self._check()

    def _lose(self, which: int) -> None:
        self.lose = which

    def _break(self, which: int) -> None:
        self.fail = which

    def _hold(self, count: int) -> None:
        self.held += self.pool.allocate(min(count, self.pool.free))

    def _unhold(self) -> None:
        self.pool.release(self.held)
        self.held = []

    def _jump(self, microseconds: int) -> None:
        self.now += microseconds

    def _repeat(self) -> None:
        """A completion that has been taken is refused, and changes nothing."""
        if self.last is None:
            return
        plan, tokens = self.last
        before = {name: list(output) for name, output in self.output.items()}
        try:
            self.scheduler.commit(plan.step, plan.rows, tokens, {})
        except ValueError:
            self._count("repeated")
        else:
            raise AssertionError("a completion counted twice")
        assert before == self.output
        self._check()

    def _resubmit(self) -> None:
        live = list(self.scheduler._live.values())
        if live:
            try:
                self.scheduler.submit(live[0].request, now_us=self.now)
            except ValueError:
                self._count("resubmitted")
            else:
                raise AssertionError("a number is live twice")
            self._check()

    def _step(self, elapsed: int) -> None:
        self.now += elapsed
        before = Before(self.scheduler, self.limits.max_running_of_tenant)
        plan = self.scheduler.plan(self.now)
        for finished in self.scheduler.take_ended():
            self._finish(finished)
        self._judge_plan(plan, before)
        if plan is not None:
            self._launch(plan)
        self._check()
        if self.flights and (plan is None or len(self.flights) >= self.depth):
            self._land()
            self._check()

    def _launch(self, plan: Plan) -> None:
        self.device.prepare(plan)
        drawn = {flight.step: tokens for flight, tokens in self.flights}
        tokens = []
        for row in plan.rows:
            sampled = None if row.source is None else drawn[row.source[0]][row.source[1]]
            tokens.append(self.device.run(row, self.truths[row.sequence.request.sequence_id], sampled))
            self.ran.add(row.sequence.request.sequence_id)
        self.flights.append((plan, tokens))
        self.scheduler.observe(plan.work, 5 + 3 * plan.prefill_tokens + 40 * plan.decode_tokens)

    def _land(self) -> None:
        plan, tokens = self.flights.popleft()
        if self.lose is not None:
            self._recover(plan, self.lose)
            self.lose = None
            return
        errors: dict[int, RequestError] = {}
        if self.fail is not None:
            errors[self.fail % len(plan.rows)] = InternalError("broken")
            self.fail = None
        self._take(plan.step, plan.rows, tokens, errors)
        self.last = plan, tokens

    def _recover(self, plan: Plan, culprit: int) -> None:
        """As the engine does: undo what builds on a lost step, run its rows again apart, one of which fails."""
        self._count("lost")
        for later, _ in reversed(self.flights):
            self.scheduler.rollback(later.step, later.rows)
        self.flights.clear()
        self.last = None
        gone = [row for row in plan.rows if row.sequence.status is not Status.RUNNING]
        self.scheduler.rollback(plan.step, gone)
        again = [row._replace(source=None) for row in plan.rows if row.sequence.status is Status.RUNNING]
        for index, row in enumerate(again):
            token = self.device.run(row, self.truths[row.sequence.request.sequence_id], None)
            fails = index == culprit % (2 * len(again))
            self._take(plan.step, [row], [token], {0: InternalError("lost")} if fails else {})

    def _take(self, step: int, rows: list[Row], tokens: list[int], errors: dict[int, RequestError]) -> None:
        accepted, finished = self.scheduler.commit(step, rows, tokens, errors)
        for index in accepted:
            sequence_id = rows[index].sequence.request.sequence_id
            assert sequence_id not in self.ended, "a token after the end"
            self.output[sequence_id].append(tokens[index])
            self._note((sequence_id, tokens[index]))
        for finish in finished:
            self._finish(finish)

    def _finish(self, finished: SequenceFinished) -> None:
        sequence_id = finished.sequence_id
        assert sequence_id not in self.ended, "two ends"
        word = type(finished.error).__name__ if finished.error else finished.reason.value
        self.ended[sequence_id] = word
        self._count(word)
        self._note((sequence_id, word))
        request, age = self.requests[sequence_id], self.scheduler._now_us - self.arrived[sequence_id]
        siblings = range(sequence_id // 10 * 10, sequence_id // 10 * 10 + 10)
        assert finished.started or self.ran.isdisjoint(siblings), "it ran, and is told to have not"
        whole = self.truths[sequence_id].output
        if word in ("stop", "max_tokens", "context_length"):
            assert self.output[sequence_id] == whole, "an output is not that of the solo run"
            assert word == self._reason(request, whole)
        elif word == "QueueTimeout":
            assert not finished.started
            assert request.queue_timeout_us <= age
        elif word == "DeadlineExceeded":
            assert request.deadline_us <= age
        elif word == "DeadlineUnattainable":
            assert not finished.started
            assert request.deadline_us is not None
        elif word == "time_limit":
            assert request.time_limit_us <= age
        elif word == "QueueFull":
            assert not finished.started
        else:
            assert word == "InternalError"

    def _reason(self, request: SequenceRequest, whole: list[int]) -> str:
        if whole[-1] in request.stop_token_ids and len(whole) > request.min_output_tokens:
            return FinishReason.STOP.value
        full = len(request.prompt_ids) + len(whole) == self.limits.max_model_len
        return FinishReason.CONTEXT_LENGTH.value if full else FinishReason.MAX_TOKENS.value

    def _judge_plan(self, plan: Plan | None, before: "Before") -> None:
        now = self.scheduler._now_us
        for sequence in self.scheduler._live.values():
            sequence_id, request = sequence.request.sequence_id, sequence.request
            assert sequence_id not in self.ended, "it lives after its end"
            age = now - self.arrived[sequence_id]
            assert request.deadline_us is None or age < request.deadline_us, "it lives past its deadline"
            assert request.time_limit_us is None or age < request.time_limit_us, "it lives past its time limit"
            waits = request.queue_timeout_us is not None and not sequence.group.started
            assert not waits or age < request.queue_timeout_us, "it waits past its queue_timeout"
        if plan is None:
            return
        assert len(plan.rows) <= self.limits.lanes
        assert sum(row.end - row.start for row in plan.rows) <= self.limits.max_num_batched_tokens
        assert all(row.sequence.request.sequence_id not in self.ended for row in plan.rows), "work for one that ended"
        before.judge(plan, self.scheduler)
        before.judge_service(plan, self.charged)
        self._note((plan.step, tuple((r.sequence.request.sequence_id, r.start, r.end) for r in plan.rows)))

    def _check(self) -> None:
        scheduler = self.scheduler
        if self.held:
            scheduler._running._leaving[-1] = stub = Sequence.__new__(Sequence)
            stub.blocks, stub.in_flight, stub.status, stub.lane = self.held, 1, Status.WAITING, -1
        try:
            scheduler.check()
        finally:
            scheduler._running._leaving.pop(-1, None)
        assert scheduler.waiting <= self.limits.max_queued_requests + self.limits.lanes + 3
        owners: dict[int, tuple[str, str]] = {}
        for sequence in scheduler._running:
            scope = sequence.request.tenant, sequence.request.cache.salt
            for block in sequence.blocks:
                assert owners.setdefault(block, scope) == scope, "tenants share a block"

    def _judge_end(self) -> None:
        assert self.ended.keys() == self.requests.keys(), "a sequence never ended"
        for sequence_id, output in self.output.items():
            assert output == self.truths[sequence_id].output[: len(output)], "an output is not that of the solo run"
        scheduler = self.scheduler
        assert (scheduler.running, scheduler.waiting, scheduler.waiting_tokens) == (0, 0, 0)
        assert self.pool.free == self.pool.total
        assert len(list(scheduler._deadlines)) == len(scheduler._queue._ages) == 0
        assert scheduler._flights == {}
        self._count("preempted", scheduler.preemptions)

    def _count(self, name: str, count: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + count

    def _note(self, fact: object) -> None:
        self.trace.update(repr(fact).encode())


class Before:
    """The scheduler as a plan met it, to tell whether it kept to the order of service."""

    def __init__(self, scheduler: Scheduler, max_running: int):
        self._max_running = max_running
        self._waiting = {id(s) for s in self._eligible(scheduler)}
        self._counters = {s.tenant: s.tenant.counter for s in scheduler._live.values()}

    def _eligible(self, scheduler: Scheduler) -> list[Sequence]:
        queue = scheduler._queue
        return [s for s in queue if s not in queue._held and s.tenant.running < self._max_running]

    def judge(self, plan: Plan, scheduler: Scheduler) -> None:
        """Nobody who waited, and might run, was passed by an arrival whose place was behind all along."""
        passed = [s for s in self._eligible(scheduler) if id(s) in self._waiting]
        for arrival in plan.admitted:
            if id(arrival) not in self._waiting:
                continue
            for other in passed:
                mine = arrival.rank, self._counters[arrival.tenant], *order_within(arrival)
                its = other.rank, other.tenant.counter, *order_within(other)
                if other.tenant is arrival.tenant:
                    mine, its = (mine[0], *mine[2:]), (its[0], *its[2:])
                assert mine < its, f"{other.request.sequence_id} was passed by {arrival.request.sequence_id}"

    def judge_service(self, plan: Plan, charged: dict[int, int]) -> None:
        """Tenants are charged for what was computed for the first time, and for nothing else."""
        service = dict.fromkeys(self._counters, 0.0)
        for sequence, start, end, _, _ in plan.rows:
            first = max(start, charged.get(sequence.arrival, 0))
            charged[sequence.arrival] = max(end, first)
            prompt = max(0, min(end, sequence.prompt_len) - first)
            service[sequence.tenant] += (prompt + 2 * (max(0, end - first) - prompt)) / sequence.tenant.weight
        for tenant, counter in self._counters.items():
            assert abs(tenant.counter - counter - service[tenant]) < 1e-6, "service is counted wrongly"


def run_seeds(seeds: Iterable[int], steps: int = 300) -> dict[str, int]:
    """Run the scripts of seeds; returns how often each kind of end and fault came up. The seed is in the error."""
    totals: dict[str, int] = {}
    for seed in seeds:
        world = World(write_script(seed, steps))
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        for name, count in world.counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals

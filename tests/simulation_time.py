"""The production scheduler in virtual time: steps last what a model of one billion parameters takes on two cores."""

from dataclasses import dataclass, replace
from heapq import heappop, heappush

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Limits
from millrace.server.engine.scheduler import Scheduler
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.engine.step_time import Work
from millrace.server.errors import RequestError
from millrace.server.types import Sampling

SECOND = 1_000_000  # microseconds
STEP = 150_000


def step_us(work: Work) -> int:
    """Prompts at 400 tokens a second; decodes at 42 alone, at 280 in a batch of 32."""
    return round(20_000 + 2_500 * work.prompt_tokens + 2_900 * work.decoding + 0.05 * work.attention)


@dataclass
class Life:
    """Of a sequence, in microseconds; `error` is what it ended with otherwise than by its last token."""

    request: SequenceRequest
    arrived: int
    first: int | None = None
    ended: int | None = None
    error: str = ""
    refused: bool = False  # before it was queued
    tokens: int = 0

    @property
    def wait(self) -> int:
        """Time to first token."""
        assert self.first is not None
        return self.first - self.arrived

    @property
    def in_time(self) -> bool:
        deadline = self.request.deadline_us
        return self.ended is not None and not self.error and (deadline is None or self.ended <= self.arrived + deadline)


def make(sequence_id: int, tenant: str, prompt: int, output: int, **fields: object) -> SequenceRequest:
    """A request whose prompt is like no other's, and which nothing ends before its last token."""
    tokens = [(sequence_id * 7919 + i * 31) % 50_000 for i in range(prompt)]
    return SequenceRequest(
        sequence_id, "", tenant, tokens, Sampling(seed=sequence_id), 0, max_output_tokens=output, **fields
    )


def simulate(
    arrivals: list[tuple[int, SequenceRequest]], until: int | None = None, deadlines: bool = True, **changes: object
) -> dict[int, Life]:
    """Serve requests that arrive at given times; returns what became of each. `deadlines`: the scheduler knows them."""
    values: dict[str, object] = {
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_queued_requests": 1024,
        "max_queued_tokens": 1 << 20,
        "max_step_us": STEP,
    }
    scheduler = Scheduler(Limits(**{**values, **changes}), BlockPool(2048, 32))  # type: ignore[arg-type]
    for work in (Work(32, 0, 500), Work(0, 1, 33), Work(64, 4, 5_000), Work(0, 32, 10_000)) * 8:
        scheduler.observe(work, step_us(work))  # a server that has served before
    pending: list[tuple[int, int, SequenceRequest]] = []
    for at, request in arrivals:
        heappush(pending, (at, request.sequence_id, request))
    lives: dict[int, Life] = {}
    now = 0
    while pending or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, pending[0][0])
        while pending and pending[0][0] <= now:
            at, sequence_id, request = heappop(pending)
            lives[sequence_id] = life = Life(request, at)
            try:
                scheduler.submit(request if deadlines else replace(request, deadline_us=None), now_us=now)
            except RequestError as error:
                life.ended, life.error, life.refused = now, error.reason, True
        now = _step(scheduler, lives, now)
        if until is not None and now > until:
            break
    scheduler.check()
    return lives


def _step(scheduler: Scheduler, lives: dict[int, Life], now: int) -> int:
    plan = scheduler.plan(now)
    finished = scheduler.take_ended()
    if plan is not None:
        now += step_us(plan.work)
        scheduler.observe(plan.work, step_us(plan.work))
        accepted, ended = scheduler.commit(plan.step, plan.rows, [1] * len(plan.rows), {})
        finished += ended
        for index in accepted:
            life = lives[plan.rows[index].sequence.request.sequence_id]
            life.first = life.first or now
            life.tokens += 1
    for finish in finished:
        life = lives[finish.sequence_id]
        life.ended, life.error = now, finish.error.reason if finish.error else ""
    return now

"""Who may wait: bounds on what is queued, and deadlines that cannot be met."""

from collections.abc import Collection, Sequence

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Limits
from millrace.server.engine.queue import Queue
from millrace.server.engine.sequence import Group, SequenceRequest
from millrace.server.engine.sequence import Sequence as Seq
from millrace.server.engine.step_time import LEAST_CHUNK, UNLIMITED, StepTime, Work
from millrace.server.engine.tenants import Tenant, Tenants
from millrace.server.errors import (
    DeadlineUnattainable,
    ExceedsKVCapacity,
    FieldViolation,
    PromptTooLong,
    QueueFull,
    TenantQueueFull,
)
from millrace.server.types import Priority

CAUTION = 1.5  # by which a wait is overestimated: later arrivals with earlier deadlines go first
FEW = 8  # sequences that run together once some wait, however few do now
FORGET = 0.95  # weight of the mean output of what ended before, with each sequence that ends


class Admission:
    """Asked before a request is queued; told of what ends, to know how long outputs are."""

    def __init__(self, limits: Limits, pool: BlockPool, queue: Queue, tenants: Tenants, step_time: StepTime):
        self._limits, self._pool, self._queue = limits, pool, queue
        self._tenants, self._step_time = tenants, step_time
        self._mean_output: float | None = None

    def check_size(self, request: SequenceRequest) -> None:
        """Raises PromptTooLong or ExceedsKVCapacity for what could never run."""
        tokens, longest = len(request.prompt_ids), self._limits.max_model_len - 1  # one token of output at least
        if tokens > longest:
            raise PromptTooLong(
                f"the prompt has {tokens} tokens, the model takes {longest}; shorten it or set truncate_prompt_tokens",
                metadata={"prompt_tokens": str(tokens), "limit": str(longest)},
            )
        needed = self._pool.blocks_for(min(tokens + request.max_output_tokens, self._limits.max_model_len) - 1)
        if needed > self._pool.total:
            text = (
                f"prompt and output need {needed} KV blocks of {self._pool.block_size} tokens, {self._pool.total} exist"
            )
            raise ExceedsKVCapacity(
                f"{text}; lower max_output_tokens",
                violations=[FieldViolation("stopping.max_output_tokens", text)],
                metadata={"blocks_needed": str(needed), "blocks_total": str(self._pool.total)},
            )

    def make_room(self, requests: Sequence[SequenceRequest], tenant: Tenant) -> list[Group]:
        """The requests to turn away so that this one may wait, none of which has begun: see `Queue.displaceable`.

        Raises QueueFull or TenantQueueFull. A request that exceeds a bound by itself may wait alone; it would never
        be served otherwise.
        """
        limits, queue = self._limits, self._queue
        count, tokens = len(requests), sum(len(request.prompt_ids) for request in requests)
        if tenant.queued and tenant.queued + count > limits.max_queued_of_tenant:
            raise TenantQueueFull(
                f"{tenant.queued} sequences of tenant {tenant.name!r} wait already, its limit is "
                f"{limits.max_queued_of_tenant}; wait for some to end",
                metadata={"tenant": tenant.name, "waiting_sequences": str(tenant.queued)},
                retry_after=self._drained_s(1),
            )
        waiting, waiting_tokens = len(queue), queue.tokens
        shed: list[Group] = []
        latest = queue.displaceable(tenant, requests[0].priority, limits.max_queued_requests)
        while waiting and (
            waiting + count > limits.max_queued_requests or waiting_tokens + tokens > limits.max_queued_tokens
        ):
            group = next((s.group for s in latest if s.group not in shed), None)
            if group is None:
                raise QueueFull(
                    f"{len(queue)} sequences of {queue.tokens} prompt tokens wait already; retry later",
                    metadata={"waiting_sequences": str(len(queue)), "waiting_tokens": str(queue.tokens)},
                    retry_after=self._drained_s(waiting + count - limits.max_queued_requests),
                )
            shed.append(group)
            waiting -= len(group.members)
            waiting_tokens -= sum(s.prompt_len for s in group.members)
        return shed

    def check_deadline(self, sequence: Seq, running: int) -> None:
        """Raise DeadlineUnattainable if what waits before it, and its own time, are expected to take too long."""
        if sequence.request.deadline_us is None or not self._step_time.is_known:
            return
        waits, takes = self._backlog_us(sequence, running), self.takes_us(sequence, running)
        if CAUTION * waits + takes > sequence.request.deadline_us:
            raise unattainable(waits, takes, sequence.request.deadline_us)

    def is_too_late(self, sequence: Seq, running: int, now_us: int) -> bool:
        """Whether one that would run from now on, beside those that do, is expected to miss its deadline."""
        if sequence.deadline_us is None or not self._step_time.is_known:
            return False
        return now_us + self.takes_us(sequence, running) > sequence.deadline_us

    def endangers(self, arrival: Seq, running: Collection[Seq], now_us: int) -> bool:
        """Whether it makes one of those that run, of no lesser class, miss a deadline that it would else meet."""
        some = [s for s in running if s.deadline_us is not None and s.rank <= arrival.rank]
        if not some or not self._step_time.is_known:
            return False
        before, _ = self._full_step_us(len(running), True)
        after, _ = self._full_step_us(len(running) + 1, True)
        for s in some:
            left, tokens = (s.deadline_us or 0) - now_us, max(s.least_output, s.expected_output) - len(s.output)
            if tokens * before <= left < tokens * after:
                return True
        return False

    def takes_us(self, sequence: Seq, running: int) -> float:
        """How long a sequence takes beside so many others."""
        step, prompt_us = self._full_step_us(running + 1, len(self._queue) > 1)
        steps = self._step_time.chunk_us(0, sequence.prompt_len) / prompt_us + sequence.least_output
        return max(self.alone_us(sequence), steps * step)

    def _full_step_us(self, decoding: int, waits: bool) -> tuple[float, float]:
        """How long a step takes in which so many decode, and what of it is for prompts, which fill it if one waits."""
        most = self._limits.max_step_us or UNLIMITED
        decodes = self._step_time.predict(Work(0, decoding, 0))
        least = self._step_time.chunk_us(0, LEAST_CHUNK)
        prompts = max(most - decodes, least) or 1.0
        return decodes + (prompts if waits else 0.0), prompts

    def alone_us(self, sequence: Seq) -> float:
        """What a sequence takes at least."""
        return self._step_time.alone_us(
            sequence.scheduled, sequence.prompt_len, sequence.least_output, self._limits.max_step_us or UNLIMITED
        )

    def expect(self, sequence: Seq) -> int:
        """Tokens that a new sequence will yield, as far as one knows."""
        least = sequence.least_output
        return least if self._mean_output is None else max(least, min(sequence.limit, round(self._mean_output)))

    def ended(self, sequence: Seq) -> None:
        """A sequence came to its natural end."""
        tokens = len(sequence.output)
        mean = self._mean_output
        self._mean_output = tokens if mean is None else FORGET * mean + (1 - FORGET) * tokens

    def _backlog_us(self, sequence: Seq, running: int) -> float:
        """How long what waits before a sequence will take: no more than its tenant's share of the engine lets in."""
        queue, tenant, rank = self._queue, sequence.tenant, sequence.rank
        lanes = min(self._limits.lanes, max(running, FEW))
        everything = self._step_time.backlog_us(*queue.work_before(rank), lanes)
        own = self._step_time.backlog_us(*queue.work_of(tenant, rank), lanes)
        return min(everything, own / self._tenants.share(tenant))

    def _drained_s(self, sequences: int) -> float:
        """Seconds until so many of the waiting are expected to run, at least a tenth."""
        work = self._step_time.backlog_us(*self._queue.work_before(max(Priority)), self._limits.lanes)
        return max(0.1, round(work * max(1, sequences) / max(1, len(self._queue)) / 1e6, 3))


def unattainable(waits_us: float, takes_us: float, left_us: float) -> DeadlineUnattainable:
    milliseconds = {"estimate_ms": round((waits_us + takes_us) / 1e3), "left_ms": max(0, round(left_us / 1e3))}
    return DeadlineUnattainable(
        f"the answer would take {milliseconds['estimate_ms']} ms, {round(waits_us / 1e3)} of them waiting, and its "
        f"deadline is in {milliseconds['left_ms']} ms; retry later or allow more time",
        metadata={name: str(value) for name, value in milliseconds.items()},
        retry_after=max(0.1, round(waits_us / 1e6, 3)),
    )

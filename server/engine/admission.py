"""Who may wait: bounds on what is queued, and deadlines that cannot be met."""

from collections.abc import Iterable, Sequence

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.budget import room_us
from millrace.server.engine.plan import Limits
from millrace.server.engine.queue import Queue
from millrace.server.engine.sequence import Group, SequenceRequest, Status
from millrace.server.engine.sequence import Sequence as Seq
from millrace.server.engine.sharing import Sharing
from millrace.server.engine.step_time import LEAST_CHUNK, StepTime, Work
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

# By which a wait is overestimated, since later arrivals may go first: learned, so that of those who are turned away for
# their deadline one in two hundred is told late, by the queue, and the others at once.
CAUTION, LEAST_CAUTION, MOST_CAUTION = 2.0, 1.5, 4.0
MISTAKE, TRUST = 1.1, 1.1 ** -(1 / 199)  # factors, with each who is told late, and at once
FEW = 8  # sequences that run together once some wait, however few do now
FORGET = 0.95  # weight of the mean output of what ended before, with each sequence that ends


class Admission:
    """Asked before a request is queued; told of what ends, to know how long outputs are."""

    def __init__(
        self,
        limits: Limits,
        pool: BlockPool,
        queue: Queue,
        tenants: Tenants,
        step_time: StepTime,
        sharing: Sharing,
    ):
        self._limits, self._pool, self._queue = limits, pool, queue
        self._tenants, self._step_time, self._sharing = tenants, step_time, sharing
        self._mean_output: float | None = None
        self._caution = CAUTION
        self.is_full = False  # no room for the first of the queue in the last step: it waits for outputs to end

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
            waiting -= sum(s.status is Status.WAITING for s in group.members)
            waiting_tokens -= sum(s.prompt_len for s in group.members if s.status is Status.WAITING)
        return shed

    def check_deadline(self, sequence: Seq, running: int) -> None:
        """Raise DeadlineUnattainable if what waits before it, and its own time, are expected to take too long."""
        deadline_us = sequence.request.deadline_us
        if deadline_us is None or not self._may_refuse(sequence):
            return
        waits = self._caution * self._backlog_us(sequence, running)
        takes = self._takes_us(sequence, running, deadline_us - waits)
        if waits + takes > deadline_us:
            self._doubt(running, len(self._queue))
            self._caution = max(LEAST_CAUTION, TRUST * self._caution)
            raise unattainable(waits, takes, deadline_us)

    def too_late(self, sequence: Seq, running: int, now_us: int) -> DeadlineUnattainable | None:
        """What to say to the first of the queue if, running from now on, it is expected to miss its deadline."""
        if sequence.due_us is None or not self._may_refuse(sequence):
            return None
        left = sequence.due_us - now_us
        takes = self._takes_us(sequence, running, left)
        if takes <= left:
            return None
        self._doubt(running, len(self._queue) - 1)
        if not sequence.group.was_misjudged:
            sequence.group.was_misjudged = True
            self._caution = min(MOST_CAUTION, MISTAKE * self._caution)
        return unattainable(0, takes, left)

    def endangers(self, arrival: Seq, running: Iterable[Seq], count: int, now_us: int) -> bool:
        """Whether it makes one of the `count` that run, of no lesser class, miss a deadline that it would else meet."""
        if not self._step_time.is_known:
            return False
        before, after = (self._full_step_us(decoding) for decoding in (count, count + 1))
        for s in running:
            if s.due_us is not None and s.rank <= arrival.rank:
                tokens = max(s.least_output, s.expected_output - len(s.output))
                if tokens * before <= s.due_us - now_us < tokens * after:
                    return True
        return False

    def _may_refuse(self, sequence: Seq) -> bool:
        """Not on what a few steps say, and nobody who has been told already that it runs."""
        return self._step_time.is_known and not sequence.group.started and not sequence.request.resumes

    def _doubt(self, running: int, waiting: int) -> None:
        """Nobody who is refused by an idle engine shows that its estimate is wrong: so it is trusted less each time."""
        if not running and not waiting:
            self._step_time.doubt()

    def _takes_us(self, sequence: Seq, running: int, left_us: float) -> float:
        """How long a sequence takes beside so many others; what the prefix cache has is looked for if it matters."""
        takes = self._takes_from_us(sequence, running, 0)
        if takes > left_us and (known := self._sharing.known_tokens(sequence)):
            takes = self._takes_from_us(sequence, running, known)
        limit = sequence.request.time_limit_us
        return takes if limit is None else min(takes, limit)

    def _takes_from_us(self, sequence: Seq, running: int, start: int) -> float:
        step_time, tokens = self._step_time, sequence.prompt_len - start
        decodes = step_time.predict(Work(0, running + 1, 0))
        room = max(1.0, room_us(self._limits, step_time, Work(0, running, 0)))
        prompt = step_time.chunk_us(start, tokens)
        steps = min(prompt / room, tokens / LEAST_CHUNK) + sequence.least_output
        others = step_time.chunk_us(0, self._queue.prompt_tokens_beside(sequence))
        return prompt + steps * decodes + min(others, sequence.least_output * room)

    def _full_step_us(self, decoding: int) -> float:
        """How long a step takes in which so many decode, if prompts fill it."""
        work = Work(0, decoding, 0)
        return self._step_time.predict(work) + room_us(self._limits, self._step_time, work)

    def expect(self, sequence: Seq) -> int:
        """Tokens that a new sequence will yield, as far as one knows."""
        if self._mean_output is None:
            return sequence.least_output
        return max(sequence.least_output, min(sequence.limit - sequence.prompt_len, round(self._mean_output)))

    def ended(self, sequence: Seq) -> None:
        """A sequence came to its natural end."""
        tokens = len(sequence.output)
        mean = self._mean_output
        self._mean_output = tokens if mean is None else FORGET * mean + (1 - FORGET) * tokens

    def _backlog_us(self, sequence: Seq, running: int) -> float:
        """How long what waits before a sequence will take: no more than its tenant's share of the engine lets in."""
        queue, tenant, rank = self._queue, sequence.tenant, sequence.rank
        lanes = min(self._limits.lanes, max(running, FEW))
        everything, own = (
            self._step_time.backlog_us(prompt, output if self.is_full else 0, lanes)
            for prompt, output in (queue.work_before(rank), queue.work_of(tenant, rank))
        )
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

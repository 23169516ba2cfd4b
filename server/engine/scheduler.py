"""What runs in the next step: a pure function of its state, the events and the clock given to it.

No tensors, no threads, no wall clock, no randomness: the same events give the same plans. Events are `submit`,
`cancel`, `commit` (a step came back), `rollback` (a step is lost) and `observe` (how long one took); `plan` answers
with the next step, and `take_ended` with those that ended otherwise than by a token. More than one step may be in
flight: a row may then read a token that an earlier step still samples.

In which order sequences are served stands in `queue`, who gives way in `preemption`, who may wait in `admission`, how
much a step holds in `budget`, what is not computed twice in `sharing`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from millrace.server.engine import loops
from millrace.server.engine.admission import Admission
from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.budget import Budget
from millrace.server.engine.deadlines import Deadlines, last_word
from millrace.server.engine.plan import Limits, Plan
from millrace.server.engine.preemption import Claim, cheapest
from millrace.server.engine.prefixes import Chain
from millrace.server.engine.queue import Place, Queue, aged_rank, place
from millrace.server.engine.row import Row
from millrace.server.engine.running import Running
from millrace.server.engine.sequence import Group, Sequence, SequenceFinished, SequenceRequest, Status
from millrace.server.engine.sharing import Sharing
from millrace.server.engine.step_time import StepTime, Work
from millrace.server.engine.tenants import Tenant, Tenants
from millrace.server.errors import QueueFull, RequestError
from millrace.server.types import FinishReason


class Scheduler:
    def __init__(self, limits: Limits, pool: BlockPool):
        self.limits = limits
        self.pool = pool
        self.preemptions = 0
        self.step_time = StepTime()
        self.tenants = Tenants()
        self._queue = Queue(limits.ageing_us, limits.max_running_of_tenant, self.tenants.share)
        self._sharing = Sharing(pool, self._queue)
        self._admission = Admission(limits, pool, self._queue, self.tenants, self.step_time, self._sharing)
        self._arrivals = 0
        self._steps = 0
        self._now_us = 0
        self._live: dict[int, Sequence] = {}
        self._running = Running(pool, limits.lanes)
        self._flights: dict[int, int] = {}  # step -> its rows that did not come back
        self._deadlines = Deadlines()
        self._ended: list[SequenceFinished] = []  # to be told

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        return self._queue.tokens

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._ended)

    def submit(self, *requests: SequenceRequest, now_us: int) -> None:
        """Queue the choices of one request, all of them or none.

        Raises PromptTooLong, ExceedsKVCapacity, QueueFull, TenantQueueFull, DeadlineUnattainable; ValueError on a live
        sequence_id.
        """
        self._advance(now_us)
        for request in requests:
            if request.sequence_id in self._live:
                raise ValueError(f"sequence {request.sequence_id} is live already")
            self._admission.check_size(request)
        first = requests[0]
        tenant = self.tenants.enter(first.tenant, first.tenant_weight, len(requests))
        group = Group()
        try:
            group.members = [self._sequence(request, tenant, group) for request in requests]
            self._admission.check_deadline(group.members[0], self.running)
            shed = self._admission.make_room(requests, tenant)
        except RequestError:
            for _ in requests:
                self.tenants.leave(tenant)
            raise
        for other in shed:
            self._shed(other)
        group.held = group.members[1:]
        for sequence in group.members:
            self._live[sequence.request.sequence_id] = sequence
            self._queue.put(sequence, held=sequence is not group.members[0])
            self._deadlines.note(sequence)

    def cancel(self, sequence_id: int) -> None:
        """End a sequence without a word. An unknown one is ignored: a finish and a cancel may cross."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._end(sequence)
        self._ended = [finished for finished in self._ended if finished.sequence_id != sequence_id]

    def take_ended(self) -> list[SequenceFinished]:
        """The last words, since the last call, of those whose time was over or whose place another one took."""
        ended, self._ended = self._ended, []
        return ended

    def plan(self, now_us: int) -> Plan | None:
        """The next step, or None if nothing can run: decodes, then prompts and arrivals in the order of service."""
        self._advance(now_us)
        self._end_expired()
        self._queue.age(self._now_us)
        plan = Plan(self._steps + 1)
        self._admit_outranking(plan)
        self._plan_prompts(plan, self._plan_decodes(plan))
        if not plan.rows:
            return None
        self._steps += 1
        self._flights[plan.step] = len(plan.rows)
        return plan

    def commit(
        self, step: int, rows: Iterable[Row], tokens: Iterable[int], errors: Mapping[int, RequestError]
    ) -> tuple[list[int], list[SequenceFinished]]:
        """Take the results of rows of a step: a token for each that samples (the others' mean nothing), or an error.

        Returns the indices of the rows whose token counts, and the sequences that ended. The rows of a
        sequence that ended or was cancelled meanwhile are dropped. ValueError for rows that are not in flight.
        """
        rows, tokens = list(rows), list(tokens)
        self._arrive(step, len(rows))
        accepted, others = loops.commit_plain(rows, tokens) if not errors else ([], list(range(len(rows))))
        finished: list[SequenceFinished] = []
        for index in others:
            sequence, _, end, samples, _ = rows[index]
            sequence.in_flight -= 1
            status = sequence.status
            if status is not Status.RUNNING:
                self._running.landed(sequence)
                if status is Status.FINISHED:
                    continue
            if index in errors:
                self._end(sequence)
                finished.append(sequence.finished(None, error=errors[index]))
                continue
            if status is Status.RUNNING:
                sequence.computed = end
                if end >= sequence.milestone:
                    self._sharing.reached(sequence, end)
            if samples:
                accepted.append(index)
                self._take(sequence, tokens[index], finished)
        return sorted(accepted), finished

    def rollback(self, step: int, rows: Iterable[Row]) -> None:
        """Undo rows that will never come back; the latest step first. Their tokens are planned again."""
        rows = list(rows)
        self._arrive(step, len(rows))
        for sequence, start, _, samples, _ in rows:
            sequence.in_flight -= 1
            self._running.landed(sequence)
            if samples:
                sequence.pending -= 1
                sequence.length -= 1
            if sequence.status is Status.RUNNING:
                sequence.scheduled = start

    def observe(self, work: Work, elapsed_us: int) -> None:
        """A step of that work took that long."""
        self.step_time.observe(work, elapsed_us)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds. Costs time in proportion to everything live."""
        running, waiting = list(self._running), list(self._queue)
        self._running.check()
        self._queue.check()
        for sequence in running + waiting:
            sequence.check()
        live = Counter(s.tenant for s in self._live.values())
        queued, runs = Counter(s.tenant for s in waiting), Counter(s.tenant for s in running)
        blocks = Counter[Tenant]()
        for sequence in running:
            blocks[sequence.tenant] += len(sequence.blocks)
        facts = {
            "the live are running or waiting": {id(s) for s in running + waiting} == set(map(id, self._live.values())),
            "the waiting hold no lane": all(s.lane == -1 and s.status is Status.WAITING for s in waiting),
            "tenants are counted": all(
                (t.live, t.queued, t.running, t.blocks) == (count, queued[t], runs[t], blocks[t])
                for t, count in live.items()
            ),
            "the active are those with live sequences": self.tenants.active == len(live),
            "deadlines are those of the live": all(s.request.sequence_id in self._live for s in self._deadlines),
        }
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise AssertionError(f"violated: {', '.join(wrong)}")

    def _advance(self, now_us: int) -> None:
        self._now_us = max(self._now_us, now_us)  # time that runs backwards stands still

    def _sequence(self, request: SequenceRequest, tenant: Tenant, group: Group) -> Sequence:
        tokens, cache = len(request.prompt_ids), request.cache
        shares = self.limits.prefix_caching and (cache.read or cache.write)
        self._arrivals += 1
        sequence = Sequence(
            request,
            tenant,
            group,
            self._arrivals,
            self._now_us,
            prompt_len=tokens,
            limit=min(tokens + request.max_output_tokens, self.limits.max_model_len),
            length=tokens + len(request.output_ids),
            output=list(request.output_ids),
            rank=request.priority,
            chain=Chain(request.tenant, self.pool.block_size, cache.salt) if shares else None,
        )
        sequence.expected_output = self._admission.expect(sequence)
        return sequence

    def _end_expired(self) -> None:
        for sequence in self._deadlines.expired(self._now_us):
            self._end(sequence)
            self._ended.append(last_word(sequence, self._now_us))

    def _shed(self, group: Group) -> None:
        for sequence in group.members:
            if sequence.status is Status.WAITING:
                self._end(sequence)
                text = (
                    "its place in the queue went to a request of a higher class or of a tenant with fewer; retry later"
                )
                self._ended.append(sequence.finished(None, error=QueueFull(text)))

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Plan one token for every sequence that lacks just one; return those that lack more."""
        prefilling, decoding, growing = loops.sort_running(self._running.sequences)
        if growing:
            waits = self._grow(plan, growing)
            decoding = [s for s in decoding if s.status is Status.RUNNING and s not in waits]
            prefilling = [s for s in prefilling if s.status is Status.RUNNING]
        plan.add_decodes(decoding)
        return prefilling

    def _plan_prompts(self, plan: Plan, prefilling: list[Sequence]) -> None:
        """Chunks of prompts, begun or waiting, in the order of service until the step is full."""
        self._admission.is_full = False
        if not prefilling and not len(self._queue):
            return
        budget = Budget(self.limits, self.step_time, plan.work)
        begun = sorted(prefilling, key=self._aged_place, reverse=True)
        while budget.tokens > 0:
            arrival = None if self._admission.is_full else self._queue.first()
            if arrival is not None and not (begun and self._aged_place(begun[-1]) < place(arrival)):
                if self._is_too_late(arrival):
                    continue
                if self._may_start(arrival) and self._admit(plan, arrival):
                    self._plan_chunk(plan, arrival, budget)
                    continue
                self._admission.is_full = True
            if not begun:
                return
            self._plan_chunk(plan, begun.pop(), budget)

    def _aged_place(self, sequence: Sequence) -> Place:
        """Of one that runs: it grows older like those that wait."""
        return aged_rank(sequence, self._now_us, self.limits.ageing_us), *place(sequence)[1:]

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: Budget) -> None:
        plan.add(sequence, budget.take(sequence))

    def _grow(self, plan: Plan, growing: list[Sequence]) -> list[Sequence]:
        """Give each a block; return those that must wait for blocks that come back with the steps in flight."""
        for index, sequence in enumerate(growing):
            while sequence.status is Status.RUNNING and self.pool.free == 0:
                if self._running.awaits_blocks:
                    return growing[index:]
                self._preempt(plan, cheapest(self._running))
            if sequence.status is Status.RUNNING:
                self._running.grow(sequence)
                plan.grown.append(sequence)
        return []

    def _admit_outranking(self, plan: Plan) -> None:
        """Let running sequences give way to the first in the queue, if it has the better claim and lacks the room."""
        arrival = self._queue.first()
        if arrival is None or self._running.awaits_blocks or arrival.in_flight or self._fits(arrival):
            return
        needed = self.pool.blocks_for(arrival.length)
        claim = Claim(arrival, needed, self.tenants, self.pool.total, self.limits.lanes)
        if not claim.is_modest and not self._running.any_below(arrival.rank):
            return
        free, lanes = self.pool.free, self._running.free_lanes
        victims = claim.victims(self._running)
        for count, victim in enumerate(victims, 1):
            free += self.pool.freed_by(victim.blocks)
            if free >= needed + self.running - count and lanes + count:
                for one in victims[:count]:
                    self._preempt(plan, one)
                self._admit(plan, arrival)
                return

    def _is_too_late(self, arrival: Sequence) -> bool:
        """End an arrival that would miss its deadline if it ran from now on."""
        error = self._admission.too_late(arrival, self.running, self._now_us)
        if error is None:
            return False
        self._end(arrival)
        self._ended.append(arrival.finished(None, error=error))
        return True

    def _fits(self, arrival: Sequence) -> bool:
        needed = self.pool.blocks_for(arrival.length) + self.running
        return self._running.free_lanes > 0 and needed <= self.pool.free

    def _may_start(self, arrival: Sequence) -> bool:
        """Whether it has some room, and makes nobody late."""
        return self._has_room(arrival) and not self._admission.endangers(
            arrival, self._running, self.running, self._now_us
        )

    def _has_room(self, arrival: Sequence) -> bool:
        """A lane, and a block beside what may be found, which is not looked for in vain at every step."""
        return self._running.free_lanes > 0 and not arrival.in_flight and self.pool.free > self.running

    def _admit(self, plan: Plan, sequence: Sequence) -> bool:
        """Start a sequence, with blocks for all its tokens so far, if there is room."""
        if not self._has_room(sequence):
            return False
        shared, serial = self._sharing.find(sequence)
        fresh = self.pool.blocks_for(sequence.length) - len(shared)
        # A block for each of the others keeps an arrival from being preempted as soon as it has started, and
        # one that has just given way from coming back in the same step.
        if fresh + self.pool.unowned(shared) + self.running > self.pool.free:
            return False
        self._queue.remove(sequence)
        copied = sequence.donor is not None
        self._running.start(sequence, shared, fresh)
        self._sharing.begin(sequence, len(shared), serial, plan)
        if sequence.queue_us is None:
            self._note_start(sequence, 0 if copied or sequence.group.started else sequence.scheduled)
        plan.admitted.append(sequence)
        return True

    def _note_start(self, sequence: Sequence, cached: int) -> None:
        sequence.queue_us = self._now_us - sequence.arrival_us
        sequence.cached_prompt_tokens = cached
        group = sequence.group
        if not group.started:
            group.started = True
            self._queue.started(group.members)
            for member in group.members:
                if member.status is not Status.FINISHED:
                    self._deadlines.note(member)

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        plan.drop(sequence)
        self._stop(sequence)
        sequence.status = Status.WAITING
        sequence.scheduled = sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self._queue.put(sequence)

    def _complete(self, sequence: Sequence, reason: FinishReason, stop_token_id: int | None = None) -> SequenceFinished:
        self._end(sequence)
        self._admission.ended(sequence)
        return sequence.finished(reason, stop_token_id)

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._stop(sequence)
        else:
            self._queue.remove(sequence)
        sequence.status = Status.FINISHED
        del self._live[sequence.request.sequence_id]
        self._deadlines.forget(sequence)
        self.tenants.leave(sequence.tenant)
        self._sharing.ended(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self._running.stop(sequence)
        self._queue.admissible(sequence.tenant)

    def _arrive(self, step: int, rows: int) -> None:
        left = self._flights.get(step, 0) - rows
        if left < 0:
            raise ValueError(f"{rows} rows of step {step} come back, {left + rows} are in flight")
        if left:
            self._flights[step] = left
        else:
            self._flights.pop(step, None)

    def _take(self, sequence: Sequence, token: int, finished: list[SequenceFinished]) -> None:
        """A sampled token, which may be the last."""
        sequence.pending -= 1
        sequence.output.append(token)
        if token in sequence.request.stop_token_ids:
            finished.append(self._complete(sequence, FinishReason.STOP, token))
        elif sequence.length == sequence.limit and not sequence.pending:
            finished.append(self._complete(sequence, self._limit_reason(sequence)))

    def _limit_reason(self, sequence: Sequence) -> FinishReason:
        full = sequence.limit == self.limits.max_model_len
        return FinishReason.CONTEXT_LENGTH if full else FinishReason.MAX_TOKENS

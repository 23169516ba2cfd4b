"""What runs in the next step: a pure function of its state, the events and the clock given to it.

No tensors, no threads, no wall clock, no randomness: the same events give the same plans. Events are `submit`,
`cancel`, `commit` (a step came back), `rollback` (a step is lost) and `observe` (how long one took); `plan` answers
with the next step, and `take_ended` with those that ended otherwise than by a token. More than one step may be in
flight: a row may then read a token that an earlier step still samples.

In which order sequences are served stands in `queue`, who gives way in `preemption`, who may wait in `admission`, how
much a step holds in `budget`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from millrace.server.engine.admission import Admission, unattainable
from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.budget import Budget
from millrace.server.engine.heap import Heap
from millrace.server.engine.plan import Limits, Plan, Row, new_row
from millrace.server.engine.preemption import Claim, cheapest
from millrace.server.engine.prefixes import Chain, Prefix
from millrace.server.engine.queue import Place, Queue, aged_rank, place
from millrace.server.engine.sequence import Group, Sequence, SequenceFinished, SequenceRequest, Status
from millrace.server.engine.step_time import StepTime, Work
from millrace.server.engine.tenants import Tenant, Tenants
from millrace.server.errors import DeadlineExceeded, QueueFull, QueueTimeout, RequestError
from millrace.server.types import FinishReason, Priority


class Scheduler:
    def __init__(self, limits: Limits, pool: BlockPool):
        self.limits = limits
        self.pool = pool
        self.preemptions = 0
        self.step_time = StepTime()
        self.tenants = Tenants()
        self._queue = Queue(limits.ageing_us, limits.max_running_of_tenant, self.tenants.share)
        self._admission = Admission(limits, pool, self._queue, self.tenants, self.step_time)
        self._arrivals = 0
        self._steps = 0
        self._now_us = 0
        self._live: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._ranks = [0] * len(Priority)  # how many of each class run
        self._leaving: dict[int, Sequence] = {}  # by arrival: off their lane, but a step in flight reads their blocks
        self._lanes = list(range(limits.lanes - 1, -1, -1))
        self._flights: dict[int, int] = {}  # step -> its rows that did not come back
        self._ends: Heap[Sequence] = Heap()  # by the time at which they are over
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
            self._note_end(sequence)

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
        rows = list(rows)
        self._arrive(step, len(rows))
        accepted: list[int] = []
        finished: list[SequenceFinished] = []
        for index, ((sequence, _, end, samples, _), token) in enumerate(zip(rows, tokens, strict=True)):
            sequence.in_flight -= 1
            status = sequence.status
            if status is not Status.RUNNING:
                self._landed(sequence)
                if status is Status.FINISHED:
                    continue
            if index in errors:
                self._end(sequence)
                finished.append(sequence.finished(None, error=errors[index]))
                continue
            if status is Status.RUNNING:
                sequence.computed = end
                if end >= sequence.milestone:
                    self._reached(sequence, end)
            if samples:
                accepted.append(index)
                sequence.pending -= 1
                sequence.output.append(token)
                if token in sequence.stop_token_ids:
                    finished.append(self._complete(sequence, FinishReason.STOP, token))
                elif sequence.length == sequence.limit and not sequence.pending:
                    finished.append(self._complete(sequence, self._limit_reason(sequence)))
        return accepted, finished

    def rollback(self, step: int, rows: Iterable[Row]) -> None:
        """Undo rows that will never come back; the latest step first. Their tokens are planned again."""
        rows = list(rows)
        self._arrive(step, len(rows))
        for sequence, start, end, samples, _ in rows:
            sequence.in_flight -= 1
            sequence.charged = max(sequence.charged, end)
            self._landed(sequence)
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
        running, waiting, leaving = self._running, list(self._queue), list(self._leaving.values())
        self.pool.check(sequence.blocks for sequence in running + leaving)
        self._queue.check()
        for sequence in running + waiting:
            sequence.check()
        lanes = [sequence.lane for sequence in running]
        capacity = self.pool.block_size
        tenants = {s.tenant for s in self._live.values()}
        facts = {
            "lanes are held once": sorted(lanes + self._lanes) == list(range(self.limits.lanes)),
            "the live are running or waiting": {id(s) for s in running + waiting} == set(map(id, self._live.values())),
            "the waiting hold no lane": all(s.lane == -1 for s in waiting + leaving),
            "the leaving are in flight": all(s.in_flight and s.status is not Status.RUNNING for s in leaving),
            "blocks cover what is scheduled": all(s.scheduled <= capacity * len(s.blocks) for s in running),
            "what others may find is computed": all(s.published * capacity <= s.computed for s in running),
            "milestones lie ahead": all(s.milestone > s.computed for s in running),
            "what is computed was scheduled": all(s.computed <= s.scheduled for s in running),
            "tenants are counted": all(
                (t.live, t.queued, t.running, t.blocks)
                == (
                    sum(s.tenant is t for s in self._live.values()),
                    sum(s.tenant is t for s in waiting),
                    sum(s.tenant is t for s in running),
                    sum(len(s.blocks) for s in running if s.tenant is t),
                )
                for t in tenants
            ),
            "the active are those with live sequences": self.tenants.active == len(tenants),
            "ranks are counted": self._ranks == [sum(s.rank == rank for s in running) for rank in Priority],
            "ends are those of the live": all(s.request.sequence_id in self._live for s in self._ends),
        }
        for fact, holds in facts.items():
            if not holds:
                raise AssertionError(f"violated: {fact}")

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
            stop_token_ids=request.stop_token_ids,
            deadline_us=None if request.deadline_us is None else self._now_us + request.deadline_us,
            chain=Chain(request.tenant, self.pool.block_size, cache.salt) if shares else None,
        )
        sequence.expected_output = self._admission.expect(sequence)
        return sequence

    def _note_end(self, sequence: Sequence) -> None:
        end_us = sequence.end_us
        if end_us is None:
            self._ends.remove(sequence)
        else:
            self._ends.put(sequence, (end_us, sequence.arrival))

    def _end_expired(self) -> None:
        while (sequence := self._ends.first()) is not None and self._ends.key(sequence)[0] <= self._now_us:
            self._end(sequence)
            self._ended.append(self._out_of_time(sequence))

    def _out_of_time(self, sequence: Sequence) -> SequenceFinished:
        request, age_us = sequence.request, self._now_us - sequence.arrival_us
        if request.deadline_us is not None and age_us >= request.deadline_us:
            text = f"the deadline passed after {request.deadline_us / 1e6:g} s"
            return sequence.finished(None, error=DeadlineExceeded(text))
        if request.time_limit_us is not None and age_us >= request.time_limit_us:
            return sequence.finished(FinishReason.TIME_LIMIT)
        text = f"it did not run within its queue_timeout of {(request.queue_timeout_us or 0) / 1e6:g} s; retry later"
        return sequence.finished(None, error=QueueTimeout(text))

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
        prefilling: list[Sequence] = []
        decoding: list[Sequence] = []
        growing: list[Sequence] = []
        for sequence in self._running:
            if sequence.length - sequence.scheduled > 1:
                prefilling.append(sequence)
            elif sequence.pending == 0 or self._may_decode_ahead(sequence):
                decoding.append(sequence)
                if sequence.scheduled == sequence.capacity:
                    growing.append(sequence)
        if growing:
            waits = self._grow(plan, growing)
            decoding = [s for s in decoding if s.status is Status.RUNNING and s not in waits]
            prefilling = [s for s in prefilling if s.status is Status.RUNNING]
        self._add_decodes(plan, decoding)
        return prefilling

    def _add_decodes(self, plan: Plan, decoding: list[Sequence]) -> None:
        """As `_add` for one token of each, in one loop: most rows there are."""
        step, rows, attention = plan.step, plan.rows, 0
        served: list[Tenant] = []
        for sequence in decoding:
            end = sequence.length
            source = sequence.source if sequence.pending else None
            sequence.source = step, len(rows)
            rows.append(new_row((sequence, end - 1, end, True, source)))
            attention += end
            if end > sequence.charged:
                if end > sequence.prompt_len:
                    served.append(sequence.tenant)
                else:
                    sequence.tenant.charge(1, 0)
            sequence.scheduled = end
            sequence.in_flight += 1
            sequence.pending += 1
            sequence.length = end + 1
        for tenant, tokens in Counter(served).items():
            tenant.charge(0, tokens)
        plan.decode_tokens, plan.attention = len(rows), attention

    @staticmethod
    def _may_decode_ahead(sequence: Sequence) -> bool:
        """Not beyond the end, and not past a token that sampling must know: a row can name only its last one."""
        return sequence.length < sequence.limit and (sequence.pending == 1 or not sequence.needs_history)

    def _plan_prompts(self, plan: Plan, prefilling: list[Sequence]) -> None:
        """Chunks of prompts, begun or waiting, in the order of service until the step is full."""
        budget = Budget(self.limits, self.step_time, plan.work)
        begun = sorted(prefilling, key=self._aged_place, reverse=True)
        full = False
        while budget.tokens > 0:
            arrival = None if full else self._queue.first()
            if arrival is not None and not (begun and self._aged_place(begun[-1]) < place(arrival)):
                if self._is_too_late(arrival):
                    continue
                if not self._admission.endangers(self._running, self._now_us) and self._admit(plan, arrival):
                    self._plan_chunk(plan, arrival, budget)
                    continue
                full = True
            if not begun:
                return
            self._plan_chunk(plan, begun.pop(), budget)

    def _aged_place(self, sequence: Sequence) -> Place:
        """Of one that runs: it grows older like those that wait."""
        return aged_rank(sequence, self._now_us, self.limits.ageing_us), *place(sequence)[1:]

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: Budget) -> None:
        count = budget.take(sequence)
        self._add(plan, sequence, count)
        plan.prefill_tokens += count

    def _add(self, plan: Plan, sequence: Sequence, count: int) -> None:
        start, end = sequence.scheduled, sequence.scheduled + count
        samples = end == sequence.length
        plan.rows.append(Row(sequence, start, end, samples, sequence.source if sequence.pending else None))
        plan.attention += count * (start + end + 1) // 2
        sequence.scheduled = end
        sequence.in_flight += 1
        self._charge(sequence, max(start, sequence.charged), end)
        if samples:
            sequence.source = (plan.step, len(plan.rows) - 1)
            sequence.pending += 1
            sequence.length += 1

    @staticmethod
    def _charge(sequence: Sequence, start: int, end: int) -> None:
        """`charged` is as far as it came before it gave way, or a step was lost: that costs nothing again."""
        prompt = max(0, min(end, sequence.prompt_len) - start)
        sequence.tenant.charge(prompt, max(0, end - start) - prompt)

    def _grow(self, plan: Plan, growing: list[Sequence]) -> list[Sequence]:
        """Give each a block; return those that must wait for blocks that come back with the steps in flight."""
        for index, sequence in enumerate(growing):
            while sequence.status is Status.RUNNING and self.pool.free == 0:
                if self._leaving:
                    return growing[index:]
                self._preempt(plan, cheapest(self._running))
            if sequence.status is Status.RUNNING:
                sequence.blocks += self.pool.allocate(1)
                sequence.capacity += self.pool.block_size
                sequence.tenant.blocks += 1
                plan.grown.append(sequence)
        return []

    def _admit_outranking(self, plan: Plan) -> None:
        """Let running sequences give way to the first in the queue, if it has the better claim and lacks the room."""
        arrival = self._queue.first()
        if arrival is None or self._leaving or arrival.in_flight or (self._lanes and self._fits(arrival)):
            return
        needed = self.pool.blocks_for(arrival.length)
        claim = Claim(arrival, needed, self.tenants, self.pool.total, self.limits.lanes)
        if not claim.is_modest and not any(self._ranks[arrival.rank + 1 :]):
            return
        free, lanes = self.pool.free, len(self._lanes)
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
        if arrival.group.started or not self._admission.is_too_late(arrival, self.running, self._now_us):
            return False
        self._end(arrival)
        left = (arrival.deadline_us or 0) - self._now_us
        self._ended.append(arrival.finished(None, error=unattainable(0, self._admission.alone_us(arrival), left)))
        return True

    def _fits(self, arrival: Sequence) -> bool:
        return self.pool.blocks_for(arrival.length) + self.running <= self.pool.free

    def _admit(self, plan: Plan, sequence: Sequence) -> bool:
        """Start a sequence, with blocks for all its tokens so far, if there is room."""
        # One block at least is needed beside what may be found, which is not looked for in vain at every step.
        if not self._lanes or sequence.in_flight or self.pool.free <= self.running:
            return False
        donor = sequence.donor
        found = self._find_prefix(sequence)
        shared = (
            donor.blocks[: (sequence.prompt_len - 1) // self.pool.block_size] if donor else [p.block for p in found]
        )
        needed = self.pool.blocks_for(sequence.length) - len(shared)
        # A block for each of the others keeps an arrival from being preempted as soon as it has started, and
        # one that has just given way from coming back in the same step.
        if needed + self.pool.unowned(shared) + self.running > self.pool.free:
            return False
        self._queue.remove(sequence)
        sequence.status = Status.RUNNING
        sequence.lane = self._lanes.pop()
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(needed)
        sequence.capacity = len(sequence.blocks) * self.pool.block_size
        sequence.scheduled = len(shared) * self.pool.block_size
        if donor:
            self._copy_rest(plan, donor, sequence, len(shared))
        sequence.computed = sequence.scheduled
        sequence.published = len(shared)
        self._let_others(sequence)
        sequence.last_prefix = found[-1].serial if found else 0 if not shared else None
        sequence.tenant.running += 1
        sequence.tenant.blocks += len(sequence.blocks)
        if sequence.queue_us is None:
            self._note_start(sequence, 0 if donor else min(sequence.scheduled, sequence.prompt_len))
        self._ranks[sequence.rank] += 1
        self._running.append(sequence)
        plan.admitted.append(sequence)
        return True

    def _copy_rest(self, plan: Plan, donor: Sequence, sequence: Sequence, shared: int) -> None:
        """A choice that begins computes the last token of the prompt, and copies what its block holds before it."""
        last = sequence.prompt_len - 1
        if last > sequence.scheduled:
            plan.copies.append((donor.blocks[shared], sequence.blocks[shared]))
            sequence.scheduled = last

    def _note_start(self, sequence: Sequence, cached: int) -> None:
        sequence.queue_us = self._now_us - sequence.arrival_us
        sequence.cached_prompt_tokens = cached
        group = sequence.group
        if not group.started:
            group.started = True
            self._queue.started(group.members)
            for member in group.members:
                if member.status is not Status.FINISHED:
                    self._note_end(member)

    def _find_prefix(self, sequence: Sequence) -> list[Prefix]:
        """Blocks that hold its first tokens already; one token at least is left, to sample from."""
        if sequence.chain is None or not sequence.request.cache.read:
            return []
        full = (sequence.length - 1) // self.pool.block_size
        sequence.extend_chain(sequence.chain, full)
        return self.pool.prefixes.find(sequence.chain, full)

    def _reached(self, sequence: Sequence, end: int) -> None:
        """The keys and values of the first `end` tokens are there: for others of the tenant, and for other choices."""
        if end // self.pool.block_size > sequence.published:
            self._publish(sequence, end)
        self._let_others(sequence)

    def _let_others(self, sequence: Sequence) -> None:
        """Other choices need the prompt computed; then, or until then, the next milestone is a full block."""
        if sequence.computed >= sequence.prompt_len:
            for choice in sequence.group.held:
                self._queue.let_go(choice)
            sequence.group.held = []
        full = (sequence.published + 1) * self.pool.block_size
        sequence.milestone = min(full, sequence.prompt_len) if sequence.group.held else full

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Others may find the full blocks among the first `end` tokens."""
        full = end // self.pool.block_size
        if sequence.chain is not None and sequence.request.cache.write:
            sequence.extend_chain(sequence.chain, full)
            for index in range(sequence.published, full):
                if sequence.last_prefix is None:
                    break
                block = sequence.blocks[index]
                sequence.last_prefix = self.pool.publish(sequence.chain, index, sequence.last_prefix, block)
        sequence.published = full

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        plan.drop(sequence)
        self._stop_running(sequence)
        sequence.status = Status.WAITING
        sequence.charged = max(sequence.charged, sequence.scheduled)
        sequence.scheduled = sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self._queue.put(sequence)

    def _complete(self, sequence: Sequence, reason: FinishReason, stop_token_id: int | None = None) -> SequenceFinished:
        self._end(sequence)
        self._admission.ended(sequence)
        return sequence.finished(reason, stop_token_id)

    def _end(self, sequence: Sequence) -> None:
        group = sequence.group
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        else:
            self._queue.remove(sequence)
        sequence.status = Status.FINISHED
        del self._live[sequence.request.sequence_id]
        self._ends.remove(sequence)
        self.tenants.leave(sequence.tenant)
        if sequence in group.held:
            group.held.remove(sequence)
        elif group.held:  # it computed the prompt for the others
            self._queue.let_go(group.held.pop(0))

    def _stop_running(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        self._running.remove(sequence)
        self._ranks[sequence.rank] -= 1
        self._lanes.append(sequence.lane)
        sequence.lane = -1
        tenant.running -= 1
        tenant.blocks -= len(sequence.blocks)
        self._queue.admissible(tenant)
        if sequence.in_flight:
            self._leaving[sequence.arrival] = sequence
        else:
            self._release(sequence)

    def _arrive(self, step: int, rows: int) -> None:
        left = self._flights.get(step, 0) - rows
        if left < 0:
            raise ValueError(f"{rows} rows of step {step} come back, {left + rows} are in flight")
        if left:
            self._flights[step] = left
        else:
            self._flights.pop(step, None)

    def _landed(self, sequence: Sequence) -> None:
        """With its last row that was in flight, the blocks of a sequence that left are free."""
        if sequence.in_flight == 0 and sequence.arrival in self._leaving:
            del self._leaving[sequence.arrival]
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _limit_reason(self, sequence: Sequence) -> FinishReason:
        full = sequence.limit == self.limits.max_model_len
        return FinishReason.CONTEXT_LENGTH if full else FinishReason.MAX_TOKENS

"""What runs in the next step: a pure function of its state, the events and the clock given to it.

No tensors, no threads, no wall clock, no randomness: the same events give the same plans. Events are
`submit`, `cancel`, `commit` (a step came back) and `rollback` (a step is lost); `plan` answers with the next
step. More than one step may be in flight: a row may then read a token that an earlier step still samples.

Order of service is order of arrival. Every running sequence arrived before every waiting one; when blocks
run out the latest arrival gives way and starts over, so the oldest always advances: no livelock.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Limits, Plan, Row
from millrace.server.engine.prefixes import Chain, Prefix
from millrace.server.engine.sequence import Sequence, SequenceFinished, SequenceRequest, Status
from millrace.server.errors import ExceedsKVCapacity, FieldViolation, PromptTooLong, QueueFull, RequestError
from millrace.server.types import FinishReason


class Scheduler:
    def __init__(self, limits: Limits, pool: BlockPool):
        self.limits = limits
        self.pool = pool
        self.preemptions = 0
        self.waiting_tokens = 0
        self._arrivals = 0
        self._steps = 0
        self._live: dict[int, Sequence] = {}
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()  # by arrival
        self._running: list[Sequence] = []  # in order of arrival
        self._leaving: dict[int, Sequence] = {}  # by arrival: off their lane, but a step in flight reads their blocks
        self._lanes = list(range(limits.lanes - 1, -1, -1))

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def submit(self, *requests: SequenceRequest, now_us: int) -> None:
        """Queue the choices of one request, all of them or none.

        Raises PromptTooLong, ExceedsKVCapacity, QueueFull; ValueError on a live sequence_id.
        """
        for request in requests:
            if request.sequence_id in self._live:
                raise ValueError(f"sequence {request.sequence_id} is live already")
            self._check_size(len(request.prompt_ids), self._limit(request))
        self._check_queue(len(requests), sum(len(request.prompt_ids) for request in requests))
        for request in requests:
            tokens, limit = len(request.prompt_ids), self._limit(request)
            self._arrivals += 1
            chain = Chain(request.tenant, self.pool.block_size) if self.limits.prefix_caching else None
            sequence = Sequence(
                request, self._arrivals, now_us, prompt_len=tokens, limit=limit, length=tokens, chain=chain
            )
            self._live[request.sequence_id] = sequence
            self._waiting[sequence.arrival] = sequence
            self.waiting_tokens += tokens

    def cancel(self, sequence_id: int) -> None:
        """End a sequence without a word. An unknown one is ignored: a finish and a cancel may cross."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._end(sequence)

    def plan(self, now_us: int) -> Plan | None:
        """The next step, or None if nothing can run: decodes, then prefill chunks, then arrivals."""
        plan = Plan(self._steps + 1)
        prefilling = self._plan_decodes(plan)
        budget = self.limits.max_num_batched_tokens - len(plan.rows)
        for sequence in prefilling:
            if budget and sequence.status is Status.RUNNING:
                budget -= self._plan_chunk(plan, sequence, budget)
        while budget and (arrival := self._admit(now_us)) is not None:
            plan.admitted.append(arrival)
            budget -= self._plan_chunk(plan, arrival, budget)
        if not plan.rows:
            return None
        self._steps += 1
        return plan

    def commit(
        self, rows: Iterable[Row], tokens: Iterable[int], errors: Mapping[int, RequestError]
    ) -> tuple[list[int], list[SequenceFinished]]:
        """Take the results of rows in flight: a token for each that samples (the others' mean nothing), or an error.

        Returns the indices of the rows whose token counts, and the sequences that ended. The rows of a
        sequence that ended or was cancelled meanwhile are dropped.
        """
        accepted: list[int] = []
        finished: list[SequenceFinished] = []
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            sequence = row.sequence
            self._land(sequence)
            if sequence.status is Status.FINISHED:
                continue
            if index in errors:
                self._end(sequence)
                finished.append(sequence.finished(None, error=errors[index]))
                continue
            if sequence.status is Status.RUNNING and row.end // self.pool.block_size > sequence.published:
                self._publish(sequence, row.end)
            if row.samples:
                accepted.append(index)
                sequence.pending -= 1
                sequence.output.append(token)
                if token in sequence.request.stop_token_ids:
                    self._end(sequence)
                    finished.append(sequence.finished(FinishReason.STOP, token))
                elif sequence.prompt_len + len(sequence.output) == sequence.limit:
                    self._end(sequence)
                    finished.append(sequence.finished(self._limit_reason(sequence)))
        return accepted, finished

    def rollback(self, rows: Iterable[Row]) -> None:
        """Undo rows that will never come back; the latest step first. Their tokens are planned again."""
        for sequence, start, _, samples, _ in rows:
            self._land(sequence)
            if samples:
                sequence.pending -= 1
                sequence.length -= 1
            if sequence.status is Status.RUNNING:
                sequence.scheduled = start

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds. Costs time in proportion to everything live."""
        running, waiting, leaving = self._running, list(self._waiting.values()), list(self._leaving.values())
        self.pool.check(sequence.blocks for sequence in running + leaving)
        for sequence in running + waiting:
            sequence.check()
        order = [sequence.arrival for sequence in running + waiting]
        lanes = [sequence.lane for sequence in running]
        capacity = self.pool.block_size
        facts = {
            "service is in order of arrival": order == sorted(order),
            "lanes are held once": sorted(lanes + self._lanes) == list(range(self.limits.lanes)),
            "the live are running or waiting": {id(s) for s in running + waiting} == set(map(id, self._live.values())),
            "the waiting hold no lane": all(s.lane == -1 for s in waiting + leaving),
            "the leaving are in flight": all(s.in_flight and s.status is not Status.RUNNING for s in leaving),
            "blocks cover what is scheduled": all(s.scheduled <= capacity * len(s.blocks) for s in running),
            "what others may find is computed": all(s.published * capacity <= s.scheduled for s in running),
            "waiting tokens add up": self.waiting_tokens == sum(s.prompt_len for s in waiting),
        }
        for fact, holds in facts.items():
            if not holds:
                raise AssertionError(f"violated: {fact}")

    def _limit(self, request: SequenceRequest) -> int:
        return min(len(request.prompt_ids) + request.max_output_tokens, self.limits.max_model_len)

    def _check_size(self, tokens: int, limit: int) -> None:
        longest = self.limits.max_model_len - 1  # one token of output at least
        if tokens > longest:
            raise PromptTooLong(
                f"the prompt has {tokens} tokens, the model takes {longest}; shorten it or set truncate_prompt_tokens",
                metadata={"prompt_tokens": str(tokens), "limit": str(longest)},
            )
        needed = self.pool.blocks_for(limit - 1)
        if needed > self.pool.total:
            text = (
                f"prompt and output need {needed} KV blocks of {self.pool.block_size} tokens, {self.pool.total} exist"
            )
            raise ExceedsKVCapacity(
                f"{text}; lower max_output_tokens",
                violations=[FieldViolation("stopping.max_output_tokens", text)],
                metadata={"blocks_needed": str(needed), "blocks_total": str(self.pool.total)},
            )

    def _check_queue(self, count: int, tokens: int) -> None:
        waiting = len(self._waiting)
        too_many = waiting + count > self.limits.max_queued_requests
        # A request that exceeds a bound by itself may wait alone; it would never be served otherwise.
        if waiting and (too_many or self.waiting_tokens + tokens > self.limits.max_queued_tokens):
            raise QueueFull(
                f"{waiting} sequences of {self.waiting_tokens} prompt tokens wait already; retry later",
                metadata={"waiting_sequences": str(waiting), "waiting_tokens": str(self.waiting_tokens)},
            )

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Plan one token for every sequence that lacks just one; return those that lack more."""
        prefilling: list[Sequence] = []
        block_size = self.pool.block_size
        for sequence in self._running:  # preemption shortens it from the end
            if sequence.length - sequence.scheduled > 1:
                prefilling.append(sequence)
            elif sequence.pending == 0 or self._may_decode_ahead(sequence):
                if sequence.scheduled == len(sequence.blocks) * block_size:
                    if not self._grow(sequence):
                        continue
                    plan.grown.append(sequence)
                self._add(plan, sequence, 1)
        plan.decode_tokens = len(plan.rows)
        return prefilling

    @staticmethod
    def _may_decode_ahead(sequence: Sequence) -> bool:
        """Not beyond the end, and not past a token that sampling must know: a row can name only its last one."""
        return sequence.length < sequence.limit and (sequence.pending == 1 or not sequence.needs_history)

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        count = min(budget, sequence.length - sequence.scheduled)
        self._add(plan, sequence, count)
        plan.prefill_tokens += count
        return count

    @staticmethod
    def _add(plan: Plan, sequence: Sequence, count: int) -> None:
        start, end = sequence.scheduled, sequence.scheduled + count
        samples = end == sequence.length
        plan.rows.append(Row(sequence, start, end, samples, sequence.source if sequence.pending else None))
        sequence.scheduled = end
        sequence.in_flight += 1
        if samples:
            sequence.source = (plan.step, len(plan.rows) - 1)
            sequence.pending += 1
            sequence.length += 1

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence one more block; False if it must wait for blocks, or gave way itself."""
        while self.pool.free == 0:
            if self._leaving:
                return False  # blocks come back with the steps in flight
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _admit(self, now_us: int) -> Sequence | None:
        """Start the sequence that has waited longest, with blocks for all its tokens so far, if they are free."""
        if not self._waiting or not self._lanes:
            return None
        sequence = next(iter(self._waiting.values()))
        # One block at least is needed beside what may be found, which is not looked for in vain at every step.
        if sequence.in_flight or self.pool.free <= len(self._running):
            return None
        found = self._find_prefix(sequence)
        shared = [prefix.block for prefix in found]
        needed = self.pool.blocks_for(sequence.length) - len(shared)
        # A block for each of the others keeps an arrival from being preempted as soon as it has started, and
        # one that has just given way from coming back in the same step.
        if needed + self.pool.unowned(shared) + len(self._running) > self.pool.free:
            return None
        self._unqueue(sequence)
        sequence.status = Status.RUNNING
        sequence.lane = self._lanes.pop()
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(needed)
        sequence.scheduled = len(shared) * self.pool.block_size
        sequence.published, sequence.last_prefix = len(found), found[-1].serial if found else 0
        if sequence.queue_us is None:
            sequence.queue_us = now_us - sequence.arrival_us
            sequence.cached_prompt_tokens = sequence.scheduled
        self._running.append(sequence)
        return sequence

    def _find_prefix(self, sequence: Sequence) -> list[Prefix]:
        """Blocks that hold its first tokens already; one token at least is left, to sample from."""
        if sequence.chain is None:
            return []
        full = (sequence.length - 1) // self.pool.block_size
        sequence.extend_chain(sequence.chain, full)
        return self.pool.prefixes.find(sequence.chain, full)

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Others may find the full blocks among the first `end` tokens: their keys and values are computed."""
        full = end // self.pool.block_size
        if sequence.chain is not None:
            sequence.extend_chain(sequence.chain, full)
            for index in range(sequence.published, full):
                if sequence.last_prefix is None:
                    break
                block = sequence.blocks[index]
                sequence.last_prefix = self.pool.publish(sequence.chain, index, sequence.last_prefix, block)
        sequence.published = full

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.status = Status.WAITING
        sequence.scheduled = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting[sequence.arrival] = sequence
        self._waiting.move_to_end(sequence.arrival, last=False)
        self.waiting_tokens += sequence.prompt_len

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        else:
            self._unqueue(sequence)
        sequence.status = Status.FINISHED
        del self._live[sequence.request.sequence_id]

    def _unqueue(self, sequence: Sequence) -> None:
        del self._waiting[sequence.arrival]
        self.waiting_tokens -= sequence.prompt_len

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._lanes.append(sequence.lane)
        sequence.lane = -1
        if sequence.in_flight:
            self._leaving[sequence.arrival] = sequence
        else:
            self._release(sequence)

    def _land(self, sequence: Sequence) -> None:
        """One row less in flight; with the last one the blocks of a sequence that left are free."""
        sequence.in_flight -= 1
        if self._leaving and sequence.in_flight == 0 and sequence.arrival in self._leaving:
            del self._leaving[sequence.arrival]
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _limit_reason(self, sequence: Sequence) -> FinishReason:
        full = sequence.limit == self.limits.max_model_len
        return FinishReason.CONTEXT_LENGTH if full else FinishReason.MAX_TOKENS

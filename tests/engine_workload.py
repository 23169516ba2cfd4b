"""Random traffic against an engine with a fake executor, judged after every step. One seed, one trace."""

import random
from collections.abc import Hashable

from engine_fakes import VOCABULARY, make_engine, make_request, solo

from millrace.server.engine.sequence import SequenceFinished, SequenceRequest
from millrace.server.errors import Overloaded, QueueFull
from millrace.server.types import Sampling


class Workload:
    """Arrivals, cancels and faults of one seed; `run` returns the trace and asserts everything on the way."""

    def __init__(self, seed: int, steps_in_flight: int, faults: bool = False, shared: bool = False):
        """`shared`: prompts begin alike, and tenants differ."""
        self.random, self.faults, self.shared = random.Random(seed), faults, shared
        r = self.random
        self.max_model_len = r.randint(8, 40)
        self.block_size = r.randint(1, 5)
        self.blocks = -(-self.max_model_len // self.block_size) + r.choice((0, 0, 2, 20))
        self.max_num_seqs, self.budget = r.randint(1, 6), r.randint(1, 16)
        self.queue = r.choice((2, 8, 100))
        self.engine, self.executor, self.clock = make_engine(
            blocks=self.blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            steps_in_flight=steps_in_flight,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_queued_requests=self.queue,
            max_queued_tokens=self.queue * 10,
        )
        self.requests: dict[int, SequenceRequest] = {}
        self.arrived: dict[int, int] = {}  # microseconds
        self.tokens: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.served: dict[int, int] = {}  # microseconds
        self.preemptions = self.rejected = self.failed = self.cached = 0
        self.trace: list[Hashable] = []

    def run(self, arrivals: int = 25) -> list[Hashable]:
        for sequence_id in range(arrivals):
            self._arrive(sequence_id)
            for _ in range(self.random.choice((0, 0, 1, 2, 5))):
                self._step()
            if self.random.random() < 0.2 and self.requests:
                victim = self.random.choice(list(self.requests))
                self.engine.cancel(victim)
                self.ended.add(victim)
                self.engine.check()
        steps = 0
        while self.engine.has_work:
            self._step()
            steps += 1
            assert steps < 3000, "no progress"
        self._judge()
        return self.trace

    def _arrive(self, sequence_id: int) -> None:
        r = self.random
        length = r.randint(1, self.max_model_len - 1)
        output = r.randint(1, 20)
        prompt = [r.randrange(VOCABULARY) for _ in range(length)]
        tenant = "tenant"
        if self.shared:
            alike, step = r.randint(0, length), r.choice((1, 1, 7))
            prompt[:alike] = [i * step % VOCABULARY for i in range(alike)]
            tenant = r.choice("aab")
        request = make_request(
            sequence_id,
            prompt,
            tenant=tenant,
            sampling=Sampling(seed=r.randrange(2**64), repetition_penalty=r.choice((1.0, 1.0, 1.5))),
            choice=r.randrange(3),
            max_output_tokens=output,
            min_output_tokens=r.choice((0, r.randint(0, output))),
            stop_token_ids=frozenset(r.sample(range(VOCABULARY), r.choice((0, 3, 10)))),
            logprobs_top_n=r.choice((None, 1)),
        )
        try:
            self.engine.submit(request)
        except Overloaded:
            self.rejected += 1
        else:
            self.requests[sequence_id] = request
            self.arrived[sequence_id] = self.clock.now
            self.tokens[sequence_id] = []
        self.engine.check()

    def _step(self) -> None:
        self.clock.now += 1
        if self.faults:
            fatal = self.random.randrange(60)
            self.executor.poison = lambda tokens: (tokens[0] * 7 + len(tokens)) % 60 == fatal
            self.executor.bad_row = lambda tokens: (tokens[0] * 5 + len(tokens)) % 90 == fatal
        before = len(self.executor.batches)
        output = self.engine.step()
        self.engine.check()
        for batch in self.executor.batches[before:]:
            assert len(batch.token_ids) <= self.budget
            assert len(batch.outputs) <= self.max_num_seqs
        stats = output.stats
        assert stats.running <= self.max_num_seqs
        assert stats.waiting <= self.queue + self.max_num_seqs
        for token in output.tokens:
            assert token.sequence_id not in self.ended, "a token after the end"
            asked = self.requests[token.sequence_id].logprobs_top_n is not None
            assert (token.logprob, list(token.top_ids)) == (
                (-token.token_id, [token.token_id]) if asked else (None, [])
            )
            self.tokens[token.sequence_id].append(token.token_id)
        for finish in output.finished:
            assert finish.sequence_id not in self.ended, "two ends"
            self._finish(finish)
        self.preemptions = stats.preemptions_total
        self.trace.append((output.step, tuple(output.tokens), repr(output.finished), repr(stats)))

    def _finish(self, finish: SequenceFinished) -> None:
        sequence_id = finish.sequence_id
        self.ended.add(sequence_id)
        self.served[sequence_id] = self.arrived[sequence_id] + finish.queue_us
        self.cached += finish.cached_prompt_tokens
        assert 0 <= finish.cached_prompt_tokens < len(self.requests[sequence_id].prompt_ids)
        if isinstance(finish.error, QueueFull):
            assert self.shared, "one tenant is turned away for another"
            assert not finish.started
            self.rejected += 1
            return
        if finish.error is not None:
            assert self.faults
            self.failed += 1
            return
        tokens, reason = solo(self.requests[sequence_id], self.max_model_len)
        assert (self.tokens[sequence_id], finish.reason) == (tokens, reason)
        assert finish.stop_token_id == (tokens[-1] if reason.value == "stop" else None)

    def _judge(self) -> None:
        assert self.ended == set(self.requests), "a sequence never ended"
        for sequence_id, request in self.requests.items():
            whole = solo(request, self.max_model_len)[0]
            assert self.tokens[sequence_id] == whole[: len(self.tokens[sequence_id])]
        if not self.shared:  # one tenant, one class, no deadline: the order of service is that of arrival
            first_service = [self.served[sequence_id] for sequence_id in sorted(self.served)]
            assert first_service == sorted(first_service), "not first come, first served"
        stats = self.engine.step().stats
        assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
        assert stats.free_blocks == stats.total_blocks

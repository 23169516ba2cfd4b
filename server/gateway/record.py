"""What a request cost: measured while it runs, written to metrics and the log when it ends."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from millrace.server.gateway.outcome import Outcome
from millrace.server.telemetry.logs import get_logger
from millrace.server.telemetry.metrics import Metrics
from millrace.server.types import Caller, Finish, GenerateRequest, Timings, TokenDelta, Usage

log = get_logger()


class Answer(Protocol):
    """What has been sent so far. `surplus_tokens`: computed and neither sent nor billed."""

    @property
    def usage(self) -> Usage: ...

    @property
    def surplus_tokens(self) -> int: ...

    @property
    def finishes(self) -> Sequence[Finish]: ...


class RequestRecord:
    """Times are seconds on the monotonic clock, counted from arrival, which is now."""

    def __init__(self, metrics: Metrics, caller: Caller, request: GenerateRequest):
        self._metrics, self._caller, self._request = metrics, caller, request
        self._arrival = time.monotonic()
        self._last: dict[int, float] = {}
        self._answer: Answer | None = None
        self._first_token: float | None = None
        self._queue_us = 0
        self._preemptions: dict[int, int] = {}
        self.request_id = request.request_id

    def admitted(self, answer: Answer) -> None:
        self._answer = answer
        self._metrics.prompt_tokens.inc(answer.usage.prompt_tokens)

    def quoted(self, answer: Answer) -> None:
        """Note an answer that is whole before it is sent."""
        self._answer = answer
        self._first_token = time.monotonic() - self._arrival
        self._metrics.time_to_first_token.observe(self._first_token)

    def step(self, news: Sequence[TokenDelta]) -> None:
        """Note what a backend delivered."""
        now = time.monotonic()
        for delta in news:
            self._queue_us = max(self._queue_us, delta.queue_us)
            self._preemptions[delta.choice] = max(self._preemptions.get(delta.choice, 0), delta.preemptions)
            if not delta.token_ids:
                continue
            if self._first_token is None:
                self._first_token = now - self._arrival
                self._metrics.time_to_first_token.observe(self._first_token)
            if delta.choice in self._last:
                self._metrics.inter_token_latency.observe((now - self._last[delta.choice]) / len(delta.token_ids))
            self._last[delta.choice] = now

    def timings(self) -> Timings:
        return Timings(
            queue_us=self._queue_us,
            time_to_first_token_us=round(1e6 * (self._first_token or 0)),
            total_us=round(1e6 * (time.monotonic() - self._arrival)),
            preemptions=sum(self._preemptions.values()),
        )

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Write the record when the block ends, however it ends."""
        outcome = Outcome()
        try:
            with outcome.watch():
                yield
        finally:
            self._write(outcome.word)

    def _write(self, outcome: str) -> None:
        metrics, timings = self._metrics, self.timings()
        if outcome == "OK":
            metrics.e2e_latency.observe(timings.total_us / 1e6)
        else:
            metrics.failure.labels(outcome).inc()
        facts: dict[str, object] = {}
        if self._answer:
            if self._first_token is not None:
                metrics.queue_time.observe(timings.queue_us / 1e6)
            usage, surplus = self._answer.usage, self._answer.surplus_tokens
            finishes = [finish.reason.value for finish in self._answer.finishes]
            for reason in finishes:
                metrics.success.labels(reason).inc()
            metrics.generation_tokens.inc(usage.output_tokens)
            metrics.cached_prompt_tokens.inc(usage.cached_prompt_tokens)
            metrics.surplus_tokens.inc(surplus)
            facts = {
                "finish": finishes,
                "prompt_tokens": usage.prompt_tokens,
                "cached_prompt_tokens": usage.cached_prompt_tokens,
                "output_tokens": usage.output_tokens,
                "embedding_tokens": usage.embedding_tokens,
                "surplus_tokens": surplus,
                "queue_us": timings.queue_us,
                "time_to_first_token_us": timings.time_to_first_token_us,
                "preemptions": timings.preemptions,
            }
        log.info(
            "request",
            request_id=self.request_id,
            tenant=self._caller.tenant,
            key_id=self._caller.key_id,
            model=self._request.model,
            outcome=outcome,
            total_us=timings.total_us,
            **facts,
            **({"labels": dict(self._request.labels)} if self._request.labels else {}),
        )

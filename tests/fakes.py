"""Stand-ins for the seams that tests share."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import islice

from millrace.server.errors import RequestError
from millrace.server.types import (
    BackendInfo,
    EngineStats,
    Finish,
    FinishReason,
    Logprobs,
    TokenDelta,
    TokenRequest,
)

INFO = BackendInfo(
    fingerprint="fake-1",
    executor="fake",
    architecture="FakeForCausalLM",
    parameters=0,
    vocab_size=8192,
    max_model_len=256,
    kv_block_size=16,
    kv_total_blocks=64,
)

Answer = Callable[[TokenRequest, int], Iterable[int]]


class FakeBackend:
    """Answers choice `c` of a request with `answer(request, c)`, `tokens_per_step` tokens a step.

    The log-probability of token t is -t. `fail_after` steps raise `error`, 0 of them at admission. While
    `paused`, a step does not come.
    """

    def __init__(self, answer: Answer, tokens_per_step: int = 1, info: BackendInfo = INFO):
        self.answer, self.tokens_per_step, self.described = answer, tokens_per_step, info
        self.error: RequestError | None = None
        self.fail_after = 0
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.ready = True
        self.requests: list[TokenRequest] = []
        self.live: set[FakeStream] = set()
        self.callbacks: list[Callable[[bool], None]] = []
        self.closed = False

    async def generate(self, request: TokenRequest) -> "FakeStream":
        await asyncio.sleep(0)
        if self.error and self.fail_after == 0:
            raise self.error
        self.requests.append(request)
        stream = FakeStream(self, request)
        self.live.add(stream)
        return stream

    def info(self) -> BackendInfo:
        return self.described

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.live), total_blocks=self.described.kv_total_blocks)

    def on_ready(self, callback: Callable[[bool], None]) -> None:
        self.callbacks.append(callback)
        callback(self.ready)

    def set_ready(self, ready: bool) -> None:
        self.ready = ready
        for callback in self.callbacks:
            callback(ready)

    async def close(self) -> None:
        self.closed = True
        for stream in list(self.live):
            await stream.aclose()


class FakeStream:
    """A running request. Every step yields one delta for each choice that still runs."""

    def __init__(self, backend: FakeBackend, request: TokenRequest):
        self.backend, self.request, self.steps = backend, request, 0
        self.running: dict[int, Iterator[int]] = {c: iter(backend.answer(request, c)) for c in range(request.n)}
        self.made = dict.fromkeys(self.running, 0)
        self.stopped = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        await asyncio.sleep(0)
        while self.running and not self.backend.resumed.is_set():
            waits = [asyncio.create_task(event.wait()) for event in (self.backend.resumed, self.stopped)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            self.stopped.clear()
        if self.backend.error and self.backend.fail_after <= self.steps:
            raise self.backend.error
        self.steps += 1
        if not self.running:
            self.backend.live.discard(self)
            raise StopAsyncIteration
        return [self.advance(choice) for choice in list(self.running)]

    def advance(self, choice: int) -> TokenDelta:
        delta = TokenDelta(choice, cached_prompt_tokens=1, queue_us=5)
        for token in islice(self.running[choice], self.backend.tokens_per_step):
            delta.token_ids.append(token)
            self.made[choice] += 1
            if token in self.request.stop_token_ids and self.made[choice] > self.request.min_output_tokens:
                delta.finish = Finish(FinishReason.STOP, stop_token_id=token)
            elif self.made[choice] == self.request.max_output_tokens:
                delta.finish = Finish(FinishReason.MAX_TOKENS)
            if delta.finish:
                del self.running[choice]
                break
        else:
            assert delta.token_ids, "an answer must end with a stop token or be long enough"
        if (top_n := self.request.logprobs_top_n) is not None:
            values = [-float(t) for t in delta.token_ids]
            delta.logprobs = Logprobs(
                top_n,
                values,
                [t + k for t in delta.token_ids for k in range(top_n)],
                [v - k for v in values for k in range(top_n)],
            )
        return delta

    def stop(self, choice: int) -> None:
        self.running.pop(choice, None)
        self.stopped.set()

    async def aclose(self) -> None:
        self.running.clear()
        self.stopped.set()
        self.backend.live.discard(self)

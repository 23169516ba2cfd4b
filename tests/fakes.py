"""Stand-ins for the seams that tests share."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from millrace.server.errors import FeatureUnsupported, PromptTooLong, RequestError
from millrace.server.types import (
    BackendInfo,
    EmbedderInfo,
    EmbedRequest,
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
EMBEDDER = EmbedderInfo(name="fake-embedder", revision="fa4e" * 16, dimensions=128, max_tokens=256, vocab_size=30_522)

Answer = Callable[[TokenRequest, int], Iterable[int]]


def bag_vector(token_ids: Sequence[int], dimensions: int) -> bytes:
    """A unit vector that is the nearer to another one the more tokens both texts have, in whatever order.

    The first and the last token of a text do not count where there are others: they are special ones.
    """
    words = sorted(set(token_ids[1:-1] or token_ids))
    vector = sum(np.random.default_rng(token).standard_normal(dimensions) for token in words)
    return (vector / np.linalg.norm(vector)).astype("<f4").tobytes()


class FakeBackend:
    """Answers choice `c` of a request with `answer(request, c)`, `tokens_per_step` tokens a step.

    The log-probability of token t is -t. `fail_after` steps raise `error`, 0 of them at admission. Texts become
    `bag_vector`s, or `embed_error`; with `embedding` None it embeds nothing. While `resumed` is clear, no step comes.
    """

    def __init__(self, answer: Answer, tokens_per_step: int = 1, info: BackendInfo = INFO):
        self.answer, self.tokens_per_step, self.described = answer, tokens_per_step, info
        self.embedding: EmbedderInfo | None = EMBEDDER
        self.error: RequestError | None = None
        self.embed_error: RequestError | None = None
        self.fail_after = 0
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.ready = True
        self.requests: list[TokenRequest] = []
        self.embed_requests: list[EmbedRequest] = []
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

    async def embed(self, request: EmbedRequest) -> list[bytes]:
        info = self.embedder()
        self.embed_requests.append(request)
        await asyncio.sleep(0)
        await self.resumed.wait()
        if self.embed_error:
            raise self.embed_error
        for text in request.texts:
            assert text, "a text has a token at least"
            assert 0 <= min(text) <= max(text) < info.vocab_size
            if len(text) > info.max_tokens:
                raise PromptTooLong(f"the text has {len(text)} tokens, the model takes {info.max_tokens}")
        return [bag_vector(text, info.dimensions) for text in request.texts]

    def embedder(self) -> EmbedderInfo:
        if self.embedding is None:
            raise FeatureUnsupported("this backend embeds nothing")
        return self.embedding

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

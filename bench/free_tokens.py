"""The real API and gateway in a process of its own, over a backend whose tokens cost nothing."""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import uvloop

from millrace.server.api.server import ApiServer
from millrace.server.config import BUILTIN, ServerConfig
from millrace.server.errors import FeatureUnsupported
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.telemetry.logs import configure_logs
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import (
    BackendInfo,
    Caller,
    EmbedderInfo,
    EmbedRequest,
    EngineStats,
    Finish,
    FinishReason,
    TokenDelta,
    TokenRequest,
)

CONTEXT = 1_000_000
MAX_RATE = 8191  # steps a second: they are told by token ids
INFO = BackendInfo("bench", "bench", "None", 0, MAX_RATE + 1, CONTEXT, 16, 0)
TEXT = " and the water that turns the wheel comes down the race"


class Run:
    """Streams that begin together once all of them are open, then step `rate` times a second (0: without pause)."""

    def __init__(self, rate: int, streams: int):
        self._rate, self._missing, self._all = rate, streams, asyncio.Event()
        self._count, self._next = 0, asyncio.Event()

    @property
    def is_full(self) -> bool:
        return self._all.is_set()

    def join(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._all.set()
            if self._rate:
                self._ticks = asyncio.create_task(self._tick(time.monotonic()))

    async def _tick(self, start: float) -> None:
        """Count steps by the clock and wake everybody at once, as the message of an engine step does."""
        while True:
            self._count = int((time.monotonic() - start) * self._rate)
            self._next.set()
            self._next = asyncio.Event()
            await asyncio.sleep(start + (self._count + 1) / self._rate - time.monotonic())

    async def steps(self, seen: int) -> int:
        """Wait until there are more than `seen` steps; return how many."""
        await self._all.wait()
        while self._rate and self._count <= seen:
            await self._next.wait()
        return self._count if self._rate else seen + 1


class FreeTokens:
    """A Backend. A prompt of three ids says what to do: steps a second, tokens a step, streams that begin together."""

    def __init__(self, words: list[int]):
        self._words, self._runs = words, dict[tuple[int, ...], Run]()

    async def generate(self, request: TokenRequest) -> "FreeStream":
        rate, chunk, streams = plan = tuple(request.prompt_ids)
        run = self._runs.setdefault(plan, Run(rate, streams))
        run.join()
        if run.is_full:
            del self._runs[plan]
        return FreeStream(self._words, run, chunk, request.max_output_tokens)

    async def embed(self, request: EmbedRequest) -> Sequence[bytes]:
        raise FeatureUnsupported("this backend embeds nothing")

    def embedder(self) -> EmbedderInfo:
        raise FeatureUnsupported("this backend embeds nothing")

    def info(self) -> BackendInfo:
        return INFO

    def stats(self) -> EngineStats:
        return EngineStats()

    def on_ready(self, callback: object) -> None: ...

    async def close(self) -> None: ...


class FreeStream:
    """Its deltas hold all tokens that are due: those of many steps if nobody asked meanwhile."""

    def __init__(self, words: list[int], run: Run, chunk: int, limit: int):
        self._words, self._run, self._chunk, self._left = words, run, chunk, limit

    async def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        seen = 0
        while self._left:
            steps = await self._run.steps(seen)
            count = min((steps - seen) * self._chunk, self._left)
            seen = steps
            self._left -= count
            ids = [self._words[(self._left + i) % len(self._words)] for i in range(count)]
            yield [TokenDelta(0, ids, finish=None if self._left else Finish(FinishReason.MAX_TOKENS))]

    def stop(self, choice: int) -> None:
        self._left = 0

    async def aclose(self) -> None:
        self._left = 0


def serve(pipe: Connection) -> None:
    """The server process: sends its port, ends when the pipe does."""
    configure_logs("json", "error")

    async def main() -> None:
        tokenizer = Tokenizer.load(BUILTIN)
        words = tokenizer.encode(TEXT, add_special_tokens=False)
        card = ModelCard("bench", tokenizer, FreeTokens(words))
        gateway = Gateway(Routes([card]), Limits(lambda tenant: 1_000_000), Metrics())
        server = ApiServer(gateway, ServerConfig.model_validate({"port": 0}), lambda _: Caller("bench"), CONTEXT)
        pipe.send(await server.start())
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pipe.fileno(), ended.set)
        await ended.wait()
        await server.stop(0)
        gateway.close()

    uvloop.run(main())


@contextmanager
def server_process() -> Iterator[tuple[int, int]]:
    """Yield (port, pid)."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv(), process.pid or 0
    finally:
        ours.close()
        process.join(20)
        process.kill()
        process.join()
        process.close()

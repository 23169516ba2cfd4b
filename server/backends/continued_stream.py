"""A stream that outlives the worker it began on."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from millrace.server.backends.token_stream import MergedStream
from millrace.server.errors import (
    EngineLost,
    EngineRestarting,
    Overloaded,
    QueueTimeout,
    RequestError,
    Unavailable,
)
from millrace.server.types import BackendInfo, TokenDelta, TokenRequest

MOST_WITHOUT_PROGRESS = 2  # times that a request goes on without having got a token since the last time
RETRY = 0.5  # seconds, at most, between attempts to be accepted


class Link(Protocol):
    """What a continued stream needs of its client."""

    def info(self) -> BackendInfo: ...
    def begin(self, request: TokenRequest) -> MergedStream: ...
    async def present(self) -> None:
        """Wait for a worker. Raises a RequestError if there will be none."""


class ContinuedStream:
    """A `TokenStream`. When its worker dies it goes on with the next one of equal fingerprint, if that comes, and
    takes it, within `patience` seconds: seed, choice and position decide a token, so nobody can tell from the answer.

    A request on which workers die again and again without a token ends with what the last one ended with.
    """

    def __init__(self, link: Link, request: TokenRequest, patience: float):
        self._link, self._request, self._patience = link, request, patience
        self._begun = asyncio.get_running_loop().time()
        self._fingerprint = link.info().fingerprint
        outputs = request.outputs or {}
        self._tokens = {choice: list(outputs.get(choice, ())) for choice in request.choices}  # of those that go on
        self._ran = False
        self._deaths = 0  # since the last token
        self._wait: asyncio.Timeout | None = None  # for the next worker
        self._stream = link.begin(request)

    async def start(self) -> None:
        """Return once the request runs. Raises what it was rejected with."""
        while True:
            try:
                await self._stream.admitted
                self._ran = True
                return
            except (EngineLost, EngineRestarting) as error:
                await self._continue(error)

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while True:
            try:
                news = await self._stream.__anext__()
            except (EngineLost, EngineRestarting) as error:
                await self._continue(error)
                if not self._tokens:
                    raise StopAsyncIteration from None
                continue
            for delta in news:
                self._note(delta)
            return news

    def stop(self, choice: int) -> None:
        self._tokens.pop(choice, None)
        self._stream.stop(choice)
        self._wake_if_done()

    async def aclose(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """`aclose` without a wait."""
        self._tokens.clear()
        self._stream.abandon()
        self._wake_if_done()

    def _wake_if_done(self) -> None:
        """Nothing is waited for once every choice is stopped."""
        if not self._tokens and self._wait is not None and not self._wait.expired():
            self._wait.reschedule(asyncio.get_running_loop().time())

    def _note(self, delta: TokenDelta) -> None:
        if delta.token_ids:
            self._deaths = 0
        if delta.finish:
            self._tokens.pop(delta.choice, None)
        elif delta.choice in self._tokens:
            self._tokens[delta.choice] += delta.token_ids

    async def _continue(self, error: RequestError) -> None:
        """Begin again, on the next worker, where the stream was lost; raises `error` if that cannot be."""
        try:
            async with asyncio.timeout(None) as self._wait:
                while self._tokens:
                    self._deaths += 1
                    if self._deaths > MOST_WITHOUT_PROGRESS:
                        raise error
                    try:
                        await self._begin_again()
                    except (EngineLost, EngineRestarting) as again:
                        error = again
                    else:
                        return
        except (TimeoutError, Unavailable):
            if self._tokens:
                raise self._overdue() or error from None
        finally:
            self._wait = None

    async def _begin_again(self) -> None:
        """Run on the next worker. Raises Unavailable if none comes that may, else what it rejects the request with."""
        wait, loop = self._wait, asyncio.get_running_loop()
        if wait is None:
            raise AssertionError("a stream begins again within the wait for it")
        end = loop.time() + self._patience
        while True:
            wait.reschedule(min(end, self._begun + self._left()))
            await self._link.present()
            if self._link.info().fingerprint != self._fingerprint:
                raise Unavailable("the next worker is another one")
            self._stream = self._link.begin(self._rest())
            wait.reschedule(None)  # it has a place in a queue, whose times are the worker's to keep
            try:
                await self._stream.admitted
            except QueueTimeout:
                raise
            except Overloaded as full:
                wait.reschedule(end)
                await asyncio.sleep(min(full.retry_after or RETRY, RETRY))
            except BaseException:
                self._stream.abandon()
                raise
            else:
                return

    def _left(self) -> float:
        """Seconds from the beginning within which it must have begun again, whatever comes."""
        request = self._request
        limits = (request.time_limit, request.deadline, None if self._ran else request.queue_timeout)
        return min((limit for limit in limits if limit is not None), default=float("inf"))

    def _overdue(self) -> RequestError | None:
        """What ends a stream that waited for a worker beyond its own queue_timeout."""
        limit = None if self._ran else self._request.queue_timeout
        if limit is None or asyncio.get_running_loop().time() < self._begun + limit:
            return None
        return QueueTimeout(f"it did not run within its queue_timeout of {limit:g} s; retry later")

    def _rest(self) -> TokenRequest:
        """The request as it stands: the choices that go on, their tokens, the time that is left."""
        elapsed = asyncio.get_running_loop().time() - self._begun
        request = self._request
        return replace(
            request,
            outputs={choice: tuple(tokens) for choice, tokens in self._tokens.items()},
            queue_timeout=None if self._ran or request.queue_timeout is None else request.queue_timeout - elapsed,
            time_limit=None if request.time_limit is None else request.time_limit - elapsed,
            deadline=None if request.deadline is None else request.deadline - elapsed,
            resumes=self._ran,
        )

"""Answers by request_id: who repeats a request joins its answer while it is made, and is told it again afterwards."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from millrace.server.errors import RequestIdInUse
from millrace.server.gateway.clock import interruptible
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.told import Told
from millrace.server.telemetry.logs import get_logger
from millrace.server.telemetry.metrics import Metrics
from millrace.server.types import Completed, GenerateEvent, GenerateRequest

log = get_logger()

Key = tuple[str, str]  # tenant, request_id


class Answer:
    """The events of one request so far. Whoever has seen them all drives it on, for everybody: its pace is the
    fastest reader's."""

    def __init__(self, digest: bytes, source: AsyncGenerator[GenerateEvent, None]):
        self.digest = digest
        self.events: list[GenerateEvent] = []
        self.readers = 0
        self.has_ended = False
        self.error: BaseException | None = None  # with which it has ended
        self._source = source
        self._pull: asyncio.Task[None] | None = None

    @property
    def is_whole(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Completed)

    async def advance(self) -> None:
        """Return once there is more, or the end. Cancelling ends the wait alone."""
        if self._pull is None:
            self._pull = asyncio.create_task(self._next())
        await asyncio.wait({self._pull})

    async def close(self) -> None:
        """End it. What is whole has but to say how it went."""
        while self.is_whole and not self.has_ended:
            await self.advance()
        if self._pull is not None:
            self._pull.cancel()
            await asyncio.wait({self._pull})
        await self._source.aclose()

    async def _next(self) -> None:
        try:
            self.events.append(await anext(self._source))
        except StopAsyncIteration:
            self.has_ended = True
        except BaseException as error:
            self.has_ended, self.error = True, error
        finally:
            self._pull = None


class Answers:
    """Those that are made, and those that were, see `Told`. Of one event loop.

    An answer is made under the deadline of the call that began it, and for as long as anybody reads it. One that
    failed is forgotten: its request may be repeated. What is joined or told again is neither computed nor billed.
    """

    def __init__(self, limits: Limits, metrics: Metrics):
        self._limits, self._metrics = limits, metrics
        self._made: dict[Key, Answer] = {}
        self._told = Told()

    async def read(
        self, tenant: str, request: GenerateRequest, make: Callable[[], AsyncGenerator[GenerateEvent, None]]
    ) -> AsyncGenerator[GenerateEvent, None]:
        """The events of a request with a request_id; `make` makes them where nobody else does or did.

        Raises RequestIdInUse if the id is that of another request, and what they raise.
        """
        key = tenant, request.request_id
        answer = self._made.get(key)
        if answer is not None and answer.error is None:
            self._check(answer.digest, request)
            joined = answer
            with self._limits.admit(tenant) as live:
                self._note(key, "joined")
                async with aclosing(self._follow(key, joined, lambda: interruptible(live, joined.advance()))) as events:
                    async for event in events:
                        yield event
                        live.check()
        elif told := self._told.get(key):
            self._check(told.digest, request)
            with self._limits.admit(tenant) as live:
                self._note(key, "told again")
                for event in told.events:
                    yield event
                    live.check()
        else:
            answer = self._made[key] = Answer(request.digest, make())
            async with aclosing(self._follow(key, answer, answer.advance)) as events:
                async for event in events:
                    yield event

    async def _follow(
        self, key: Key, answer: Answer, advance: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[GenerateEvent, None]:
        position = 0
        answer.readers += 1
        try:
            while True:
                while position < len(answer.events):
                    position += 1
                    yield answer.events[position - 1]
                if answer.error is not None:
                    raise answer.error
                if answer.has_ended:
                    return
                await advance()
        finally:
            answer.readers -= 1
            if not answer.readers:
                await self._leave(key, answer)

    async def _leave(self, key: Key, answer: Answer) -> None:
        """Nobody reads it any more."""
        if self._made.get(key) is answer:
            del self._made[key]
            if answer.is_whole:
                self._told.keep(key, answer.digest, answer.events)
        await answer.close()

    def _check(self, digest: bytes, request: GenerateRequest) -> None:
        if digest != request.digest:
            raise RequestIdInUse(
                f"request_id {request.request_id!r} is that of another request, which runs or ended lately; use a new "
                "one for each request, and the same one to repeat it",
                metadata={"request_id": request.request_id},
            )

    def _note(self, key: Key, how: str) -> None:
        self._metrics.repeated.labels(how).inc()
        log.info("request repeated", tenant=key[0], request_id=key[1], answer=how)

"""Answers by request_id: who repeats a request joins its answer while it is made, and is told it again afterwards."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing

from millrace.server.errors import RequestIdInUse
from millrace.server.gateway import told
from millrace.server.gateway.clock import interruptible, past_first_message
from millrace.server.gateway.limits import Limits, LiveRequest
from millrace.server.gateway.told import Told
from millrace.server.telemetry.logs import get_logger
from millrace.server.telemetry.metrics import Metrics
from millrace.server.types import Completed, GenerateEvent, GenerateRequest

log = get_logger()

Key = tuple[str, str]  # tenant, request_id


class Answer:
    """The events of one request. Whoever has seen them all drives it on, for everybody: its pace is the fastest
    reader's. Of one that is too long to be told again, events that everybody has read are dropped."""

    def __init__(self, digest: bytes, source: AsyncGenerator[GenerateEvent, None]):
        self.digest = digest
        self.events: list[GenerateEvent] = []
        self.is_whole = self.has_ended = False
        self.error: BaseException | None = None  # with which it has ended
        self._source = source
        self._pull: asyncio.Task[None] | None = None
        self._size = self._dropped = 0
        self._read: dict[object, int] = {}  # by each reader, of all events

    @property
    def is_short(self) -> bool:
        return self._size <= told.BYTES_OF_ONE

    @property
    def has_readers(self) -> bool:
        return bool(self._read)

    async def read(self, advance: Callable[[], Awaitable[None]]) -> AsyncGenerator[GenerateEvent, None]:
        """All events, then the error. `advance` is this one's, with whatever may end the wait."""
        reader = object()
        self._read[reader] = 0
        try:
            while True:
                while (at := self._read[reader] - self._dropped) < len(self.events):
                    self._read[reader] += 1
                    event = self.events[at]
                    self._drop()
                    yield event
                if self.error is not None:
                    raise self.error
                if self.has_ended:
                    return
                await advance()
        finally:
            del self._read[reader]

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
            event = await anext(self._source)
            self.events.append(event)
            self._size += told.size_of(event)
            self.is_whole = isinstance(event, Completed)
        except StopAsyncIteration:
            self.has_ended = True
        except BaseException as error:
            self.has_ended, self.error = True, error
        finally:
            self._pull = None

    def _drop(self) -> None:
        if not self.is_short:
            read = min(self._read.values()) - self._dropped
            del self.events[:read]
            self._dropped += read


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
            self._check(answer.digest, request, answer.is_short)
            joined = answer
            with self._limits.admit(tenant) as live:
                self._note(key, "joined")
                events = self._follow(key, joined, lambda: interruptible(live, joined.advance()))
                async with aclosing(repeated(events, live)) as events:
                    async for event in events:
                        yield event
        elif record := self._told.get(key):
            self._check(record.digest, request)
            with self._limits.admit(tenant) as live:
                self._note(key, "told again")
                async with aclosing(repeated(again(record.events), live)) as events:
                    async for event in events:
                        yield event
        else:
            answer = self._made[key] = Answer(request.digest, make())
            async with aclosing(self._follow(key, answer, answer.advance)) as events:
                async for event in events:
                    yield event

    async def _follow(
        self, key: Key, answer: Answer, advance: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[GenerateEvent, None]:
        try:
            async with aclosing(answer.read(advance)) as events:
                async for event in events:
                    yield event
        finally:
            if not answer.has_readers:
                await self._leave(key, answer)

    async def _leave(self, key: Key, answer: Answer) -> None:
        """Nobody reads it any more."""
        if self._made.get(key) is answer:
            del self._made[key]
            if answer.is_whole and answer.is_short:
                self._told.keep(key, answer.digest, answer.events)
        await answer.close()

    def _check(self, digest: bytes, request: GenerateRequest, can_be_joined: bool = True) -> None:
        if digest == request.digest and can_be_joined:
            return
        why = (
            "runs already, and its answer has become too long to be joined"
            if digest == request.digest
            else "is that of another request, which runs or ended lately; use a new one for each request, and the same "
            "one to repeat it"
        )
        raise RequestIdInUse(
            f"request_id {request.request_id!r} {why}",
            metadata={"request_id": request.request_id},
        )

    def _note(self, key: Key, how: str) -> None:
        self._metrics.repeated.labels(how).inc()
        log.info("request repeated", tenant=key[0], request_id=key[1], answer=how)


async def again(events: Iterable[GenerateEvent]) -> AsyncGenerator[GenerateEvent, None]:
    for event in events:
        yield event


async def repeated(
    events: AsyncGenerator[GenerateEvent, None], live: LiveRequest
) -> AsyncGenerator[GenerateEvent, None]:
    """What another call was told, for one whose place may be taken."""
    async with aclosing(events):
        async for event in events:
            yield event
            break
        with past_first_message():
            live.check()
            async for event in events:
                yield event
                live.check()

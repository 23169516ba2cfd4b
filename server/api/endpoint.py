"""The way of every RPC: who calls, read, check, do, and how it ended.

A handler is registered as stream-stream, whatever its method is: the wire does not differ, and so it runs as
soon as the headers are there. The runtime reads the whole body before it runs a handler of a unary request,
which lets callers without a key fill the memory with unfinished uploads.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from prometheus_client import Counter

from millrace.server.api import bounds
from millrace.server.api.status import Failure, failure, public
from millrace.server.api.wire import broken_field
from millrace.server.errors import DeadlineExceeded, Draining, FieldViolation, InvalidRequest, Overloaded, SlowReader
from millrace.server.telemetry.logs import get_logger
from millrace.server.types import Caller

BODY_TIMEOUT = 10.0  # seconds from headers to the end of the first request message
MAX_BODIES = 64  # request messages of one caller and method that are read at once; the others wait in line
MAX_STRANGERS = 64  # PUBLIC calls that wait for a request message

log = get_logger()

Context = grpc.aio.ServicerContext[bytes, bytes]
Authenticate = Callable[[str | None], Caller]


class Policy(Enum):
    """Who may call a method."""

    PUBLIC = "public"  # anyone
    TENANT = "tenant"  # whoever `authenticate` knows


PUBLIC_CALLER = Caller(tenant="")


class Stream:
    """Where a method writes its answers."""

    def __init__(self, context: Context, slow_reader_timeout: float):
        self._context, self._timeout = context, slow_reader_timeout
        self._begun = False

    async def write(self, message: Message) -> None:
        """Send a message. Raises SlowReader if the client's window stays full for too long."""
        try:
            async with asyncio.timeout(self._timeout):
                # gRPC would send the headers with the first message; while that is stuck, no status goes out.
                if not self._begun:
                    self._begun = True
                    await self._context.send_initial_metadata(())
                await self._context.write(message.SerializeToString())
        except TimeoutError:
            raise SlowReader(
                f"the client took nothing for {self._timeout:g} seconds; read the stream as it comes"
            ) from None


@dataclass(frozen=True, slots=True)
class Method:
    """`run` is `async (request, caller) -> response`, or `async (request, caller, stream) -> None` if it streams.

    Where the client streams, `request` is the asynchronous iterator of its messages. It raises InvalidRequest for
    what is no message; the bounds of one are for `run` to check, which may go on after a wrong one.
    """

    service: str
    name: str
    policy: Policy
    request: type[Message]
    run: Callable[..., Awaitable[Any]]
    client_streams: bool = False
    server_streams: bool = False

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"

    @property
    def is_ours(self) -> bool:
        return self.request.DESCRIPTOR.file.package == "millrace.v1"


class Strangers:
    """The calls of PUBLIC methods that wait for a request message, the one that began first in front.

    No line for them, in which calls that never go on would keep everyone else out: what comes beyond
    MAX_STRANGERS ends the one that has waited longest. An honest request comes with its headers.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Timeout, None] = {}
        self._closed = False

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait within the block. Raises Overloaded when others need the place, Draining after `close`."""
        try:
            async with asyncio.timeout(None) as place:
                self._waiting[place] = None
                self._keep(0 if self._closed else MAX_STRANGERS)
                try:
                    yield
                finally:
                    kept = place in self._waiting
                    self._waiting.pop(place, None)
        except TimeoutError:
            if kept:
                raise
            if self._closed:
                raise Draining("the server is shutting down") from None
            raise Overloaded("too many calls wait for a request message; send it with the headers") from None

    def close(self) -> None:
        """End every wait: an idle stream would outlive any grace."""
        self._closed = True
        self._keep(0)

    def _keep(self, most: int) -> None:
        for place in list(self._waiting)[: max(0, len(self._waiting) - most)]:
            del self._waiting[place]
            place.reschedule(0)


class Outcome:
    """How an RPC ended, for the log and the metrics."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.caller = PUBLIC_CALLER
        self.code, self.reason = grpc.StatusCode.CANCELLED, ""

    @property
    def level(self) -> int:
        """Failures are worth a line; of what succeeds, the gateway logs what has a cost."""
        return logging.INFO if self.reason else logging.DEBUG

    @property
    def facts(self) -> dict[str, object]:
        return {
            "tenant": self.caller.tenant,
            "code": self.code.name,
            "reason": self.reason,
            "seconds": round(time.monotonic() - self.started, 6),
        }


class Endpoint:
    """One method on the server."""

    def __init__(
        self,
        method: Method,
        authenticate: Authenticate,
        slow_reader_timeout: float,
        rpcs: Counter,
        strangers: Strangers,
    ):
        self._method, self._authenticate, self._rpcs = method, authenticate, rpcs
        self._slow_reader_timeout, self._strangers = slow_reader_timeout, strangers
        self._bodies: defaultdict[Caller, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(MAX_BODIES))

    async def serve(self, _: AsyncIterator[bytes], context: Context) -> None:
        outcome = Outcome()
        try:
            failed = await self._attempt(context, outcome)
            if failed:
                outcome.code, outcome.reason = failed.code, failed.reason
                await context.abort(failed.code, failed.message, failed.trailing_metadata)
            outcome.code = grpc.StatusCode.OK
        finally:
            self._rpcs.labels(self._method.path, outcome.code.name).inc()
            log.log(outcome.level, "rpc", method=self._method.path, **outcome.facts)

    async def _attempt(self, context: Context, outcome: Outcome) -> Failure | None:
        """Run the method; return the failure to report. Cancellation and a lost client pass through."""
        try:
            outcome.caller = self._admit(context)
            await self._run(outcome.caller, context)
        except grpc.aio.BaseError:
            raise
        except Exception as error:
            return self._report(error)
        return None

    def _report(self, error: Exception) -> Failure:
        shown = public(error)
        if shown is not error:
            log.error("internal error", method=self._method.path, exc_info=error, **shown.metadata)
        return failure(shown)

    def _admit(self, context: Context) -> Caller:
        """Decide by the headers alone. Raises Unauthenticated."""
        if self._method.policy is Policy.PUBLIC:
            return PUBLIC_CALLER
        values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        value = values[0] if len(values) == 1 else None
        caller = self._authenticate(value.decode("latin-1") if isinstance(value, bytes) else value)
        remaining = context.time_remaining()
        return caller if remaining is None else replace(caller, deadline=time.monotonic() + remaining)

    async def _run(self, caller: Caller, context: Context) -> None:
        stream = Stream(context, self._slow_reader_timeout)
        async with aclosing(self._requests(caller, context)) as requests:
            request: AsyncIterator[Message] | Message = requests
            if not self._method.client_streams:
                request = await self._only(requests)
            if self._method.server_streams:
                await self._method.run(request, caller, stream)
            else:
                await stream.write(await self._method.run(request, caller))

    async def _only(self, requests: AsyncIterator[Message]) -> Message:
        """The one request message, checked."""
        request = await anext(requests, None)
        if request is None:
            raise InvalidRequest("the call ended without a request message")
        if self._method.is_ours:
            bounds.check(request)
        return request

    async def _requests(self, caller: Caller, context: Context) -> AsyncGenerator[Message, None]:
        """The request messages; only the first one must come in time. A tenant's stream bounds its calls itself."""
        is_public = self._method.policy is Policy.PUBLIC
        is_bounded = self._method.client_streams and not is_public
        seconds = None if is_bounded else BODY_TIMEOUT
        while True:
            line = self._strangers.place() if is_public else nullcontext() if is_bounded else self._bodies[caller]
            raw = await self._read(context, line, seconds)
            if raw is None:
                return
            seconds = None
            yield self._parse(raw)

    async def _read(
        self, context: Context, line: AbstractAsyncContextManager[None], seconds: float | None
    ) -> bytes | None:
        """The next message, None after the last: read within `line`, where others wait, and within `seconds`."""
        try:
            async with line, asyncio.timeout(seconds):
                raw = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no complete request message came within {seconds:g} seconds") from None
        return raw if isinstance(raw, bytes) else None

    def _parse(self, raw: bytes) -> Message:
        try:
            return self._method.request.FromString(raw)
        except DecodeError as error:
            kind = self._method.request.DESCRIPTOR
            broken = broken_field(kind, raw) or FieldViolation("request", f"is no valid {kind.full_name}: {error}")
            raise InvalidRequest.at(broken.field, broken.description) from None

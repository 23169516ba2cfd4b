"""What ends a request early: its own time limit, and the switch of everything live."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from millrace.server.errors import Drained, Draining, EngineLost, EngineRestarting
from millrace.server.gateway.limits import LiveRequest

T = TypeVar("T")


class Clock:
    """Counts `limit` seconds from now; None is no limit. `passed`: something was cut short because they were over."""

    def __init__(self, limit: float | None):
        self._loop = asyncio.get_running_loop()
        self._end = None if limit is None else self._loop.time() + limit
        self.passed = False

    @property
    def left(self) -> float | None:
        """Seconds."""
        return None if self._end is None else self._end - self._loop.time()

    async def wait(self, live: LiveRequest, work: Awaitable[T]) -> T | None:
        """The result of `work`, which is cancelled if the time passes: None."""
        try:
            return await interruptible(live, work, self._end)
        except TimeoutError:
            self.passed = True
            return None

    @contextmanager
    def watch(self, expire: Callable[[], None]) -> Iterator[None]:
        """Call `expire` if the time passes within the block."""
        if self._end is None:
            yield
            return

        def on_time() -> None:
            self.passed = True
            expire()

        timer = self._loop.call_at(self._end, on_time)
        try:
            yield
        finally:
            timer.cancel()


async def interruptible(live: LiveRequest, work: Awaitable[T], end: float | None = None) -> T:
    """The result of `work`, which is cancelled if the request is ended (its error) or at `end` (TimeoutError)."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(end) as timeout:

            def stop() -> None:
                if not timeout.expired():
                    timeout.reschedule(loop.time())

            live.on_abort(stop)
            return await work
    except TimeoutError:
        live.check()
        raise
    finally:
        live.on_abort(nothing)


def nothing() -> None:
    """What wakes a request that waits for nothing."""


@contextmanager
def past_first_message() -> Iterator[None]:
    """What could be tried again elsewhere had the client not seen Started: a backend that dies, a drain."""
    try:
        yield
    except Draining as error:
        raise Drained(error.message, metadata=error.metadata) from None
    except EngineRestarting as error:
        raise EngineLost(error.message, metadata=error.metadata) from None

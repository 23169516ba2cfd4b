"""Who may have how many live requests, and the switch that ends them all."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from millrace.server.errors import Draining, QuotaExceeded, RequestError


class LiveRequest:
    """A request between admission and its end."""

    def __init__(self, request_id: str):
        self.request_id = request_id
        self._error: RequestError | None = None
        self._stop: Callable[[], None] | None = None

    def on_abort(self, stop: Callable[[], None]) -> None:
        """Name what wakes the request when it must end; called at once if that has been said already."""
        self._stop = stop
        if self._error:
            stop()

    def abort(self, error: RequestError) -> None:
        """End the request with `error`. Idempotent: the first error stands."""
        if self._error is None:
            self._error = error
            if self._stop:
                self._stop()

    def check(self) -> None:
        """Raise the error that the request was ended with, if it was."""
        if self._error:
            raise self._error


class Limits:
    """Live requests of every tenant. `limit_of` names how many a tenant may have."""

    def __init__(self, limit_of: Callable[[str], int]):
        self._limit_of = limit_of
        self._live: set[LiveRequest] = set()
        self._counts: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def live(self) -> int:
        return len(self._live)

    @contextmanager
    def admit(self, tenant: str, request_id: str = "") -> Iterator[LiveRequest]:
        """Hold a place for one request; an empty id is replaced by a random one.

        Raises Draining, or QuotaExceeded with `tenant` and `limit` in its metadata.
        """
        if self.draining:
            raise Draining("the server is shutting down; use another replica")
        if self._counts[tenant] >= (limit := self._limit_of(tenant)):
            raise QuotaExceeded(
                f"tenant {tenant!r} has {limit} live requests, its limit; wait for one to end",
                metadata={"tenant": tenant, "limit": str(limit), "quota": "max_concurrent_requests"},
            )
        request = LiveRequest(request_id or secrets.token_hex(12))
        self._live.add(request)
        self._counts[tenant] += 1
        self._idle.clear()
        try:
            yield request
        finally:
            self._live.remove(request)
            self._counts[tenant] -= 1
            if not self._counts[tenant]:
                del self._counts[tenant]
            if not self._live:
                self._idle.set()

    def refuse(self) -> None:
        """Admit nothing from now on."""
        self.draining = True

    async def idle(self, seconds: float) -> bool:
        """Wait until no request lives, at most `seconds`; say whether that is so."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort(self, error: RequestError) -> None:
        """End every live request with `error`."""
        for request in list(self._live):
            request.abort(error)

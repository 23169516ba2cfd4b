"""One gateway as the worker sees it: its live slots, and what it has not been told yet."""

import asyncio
from dataclasses import dataclass

import grpc

from millrace.engine.v1 import engine_pb2 as pb

# What may wait for a gateway that does not read. Some 2 million tokens: it has stopped, not fallen behind.
MAX_PENDING_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection ends; code OK: the gateway closed its side."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""


class Connection:
    """Updates leave one by one; while one is being written, later ones merge, up to a bound."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}  # live slot -> sequence id
        self.watched: set[int] = set()  # slots that the gateway may end on what their tokens say
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._pending: pb.StepUpdate | None = None
        self._pending_bytes = 0
        self._finishing = False
        self._news = asyncio.Event()

    def tell(self, update: pb.StepUpdate) -> None:
        """Queue an update, or end the connection if too much waits already."""
        if self.ended.done():
            return
        size = update.ByteSize()
        if self._pending is None:
            self._pending, self._pending_bytes = update, size
        else:
            merge(self._pending, update)
            self._pending_bytes += size
        if self._pending_bytes > MAX_PENDING_BYTES:
            details = f"the gateway does not read: {self._pending_bytes} bytes of updates wait for it"
            self.end(Ending(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
        self._news.set()

    async def next_update(self) -> pb.StepUpdate | None:
        """Wait for news and take all of it; None once all is told and `finish` was called."""
        while self._pending is None:
            if self._finishing:
                return None
            self._news.clear()
            await self._news.wait()
        update, self._pending = self._pending, None
        return update

    def finish(self) -> None:
        """Let it end when all is told."""
        self._finishing = True
        self._news.set()

    def end(self, ending: Ending) -> None:
        """Idempotent: the first reason counts. Nothing is told from now on."""
        if not self.ended.done():
            self.ended.set_result(ending)
            self._pending = None


def merge(into: pb.StepUpdate, update: pb.StepUpdate) -> None:
    """Append a later update: lists one after the other, the number and the stats of the last step."""
    if update.HasField("stats"):
        into.ClearField("stats")  # merging keeps an old value where the new one is zero
    into.MergeFrom(update)

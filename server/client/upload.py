"""The request messages of a call whose making may fail: gRPC would log why, and say that the call was cancelled.

They end there instead, so that what was sent before still lands; who reads the answers raises `error` after them.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Requests(Generic[T]):
    """Read in a thread of gRPC's."""

    def __init__(self, messages: Iterator[T]):
        self._messages = messages
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        try:
            yield from self._messages
        except Exception as error:
            self.error = error


class AsyncRequests(Generic[T]):
    """Each message is made in a thread, since it may read a file; the event loop goes on meanwhile."""

    def __init__(self, messages: Iterator[T]):
        self._messages = messages
        self.error: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            while (message := await asyncio.to_thread(next, self._messages, None)) is not None:
                yield message
        except Exception as error:
            self.error = error

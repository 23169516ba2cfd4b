"""The request messages of a call whose making may fail: gRPC would log why, and say that the call was cancelled.

They end there instead, so that what was sent before still lands; who reads the answers raises `error` after them.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Requests(Generic[T]):
    """Read once, in a thread of gRPC's."""

    def __init__(self, messages: Iterator[T]):
        self._messages = messages
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        try:
            yield from self._messages
        except Exception as error:
            self.error = error

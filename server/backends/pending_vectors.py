"""The vectors of one request on their way back: one for each text, or an error for all."""

import asyncio
from collections.abc import Callable

from millrace.server.errors import EngineRestarting, RequestError


class PendingVectors:
    """Who waits for `vectors` calls `abandon` after it, who fills them the other methods, all on one event loop."""

    def __init__(self, count: int, cancel: Callable[[], None]):
        """`cancel` frees what the texts hold whose vectors have not come; it is called once at most."""
        self.vectors: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        self._rows = [b""] * count
        self._missing = count
        self._cancel = cancel
        if count == 0:
            self.vectors.set_result([])

    def put(self, text: int, vector: bytes) -> None:
        """Little-endian float32. Once for each text."""
        self._rows[text] = vector
        self._missing -= 1
        if self._missing == 0 and not self.vectors.done():
            self.vectors.set_result(self._rows)

    def fail(self, error: RequestError) -> None:
        """The first error counts."""
        if not self.vectors.done():
            self.vectors.set_exception(error)
            self.vectors.exception()  # whoever asked may have left

    def lose(self, why: str) -> None:
        """The backend is gone. Nothing was delivered, so the request can be made again."""
        self.fail(EngineRestarting(f"{why}, before the texts were embedded"))

    def abandon(self) -> None:
        """Nobody waits any more. Idempotent."""
        if self._missing:
            self._missing = 0
            self._cancel()

"""How a piece of work ended, in one word: for metrics and the log."""

from collections.abc import Iterator
from contextlib import contextmanager

from millrace.server.errors import InternalError, RequestError


class Outcome:
    """`word`: CANCELLED until the work has ended, then `good` or the reason of its error."""

    def __init__(self, good: str = "OK"):
        self.good, self.word = good, "CANCELLED"

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The work is the block."""
        try:
            yield
            self.word = self.good
        except RequestError as error:
            self.word = error.reason
            raise
        except Exception:
            self.word = InternalError.reason
            raise

"""Many readers, or one writer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Nobody starves: a reader waits for one writer at most, a writer for the readers that came before it.

    The phase-fair lock of Brandenburg and Anderson (2010): when a writer leaves, every reader that waits
    enters before the next writer does. Not re-entrant.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._phase = 0  # writers that left
        self._readers = self._waiting_readers = 0
        self._writers = 0  # inside or waiting
        self._writing = False

    @contextmanager
    def read(self) -> Iterator[None]:
        with self._changed:
            if self._writers:
                phase = self._phase
                self._waiting_readers += 1
                self._changed.wait_for(lambda: self._phase != phase)
            else:
                self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                if self._readers == 0 and self._writers:
                    self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        with self._changed:
            self._writers += 1
            self._changed.wait_for(lambda: not self._writing and self._readers == 0)
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._writers -= 1
                self._phase += 1
                self._readers += self._waiting_readers
                self._waiting_readers = 0
                self._changed.notify_all()

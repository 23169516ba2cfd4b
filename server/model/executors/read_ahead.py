"""Has the system read files before they are used: page faults alone would read piece by piece, and nothing would be
computed meanwhile."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

STEP = 128 << 10  # bytes asked for at once: of more, Linux may drop what exceeds a device's own read-ahead
WINDOW = 256 << 20  # bytes asked for and not yet used: where memory is short, more would be dropped before its turn

Range = tuple[Path, int, int]  # bytes [begin, end) of a file


class ReadAhead:
    """A thread that asks for `ranges` in their order, as long as the context lasts. Nothing fails: what cannot be read
    ahead is read when it is used, and whoever uses it says what is wrong."""

    def __init__(self, ranges: Sequence[Range], window: int = WINDOW):
        self._ranges, self._window = ranges, window
        self._used, self._ended = 0, False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._ask, name="read-ahead", daemon=True)

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._news:
            self._ended = True
            self._news.notify()
        self._thread.join()

    def use(self, size: int) -> None:
        """The next `size` bytes of the ranges have been used."""
        with self._news:
            self._used += size
            self._news.notify()

    def _ask(self) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            files: dict[Path, int] = {}
            for path, begin, size in self._steps():
                if path not in files:
                    files[path] = os.open(path, os.O_RDONLY)
                    stack.callback(os.close, files[path])
                os.posix_fadvise(files[path], begin, size, os.POSIX_FADV_WILLNEED)

    def _steps(self) -> Iterator[Range]:
        """File, begin and size, each when its turn has come."""
        asked = 0
        for path, begin, end in self._ranges:
            for at in range(begin, end, STEP):
                with self._news:
                    while asked >= self._used + self._window and not self._ended:
                        self._news.wait()
                    if self._ended:
                        return
                size = min(STEP, end - at)
                yield path, at, size
                asked += size

"""Reading ahead asks for every byte once and in order, never further than its window, and ends when it is told."""

import os
import threading
import time
from pathlib import Path

import pytest

from millrace.server.model.executors.read_ahead import STEP, ReadAhead


class Asked:
    """What the system was asked for: file, offset and length of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ranges: list[tuple[str, int, int]] = []
        monkeypatch.setattr(os, "posix_fadvise", self._record)

    def _record(self, descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.ranges.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, offset, length))

    @property
    def bytes(self) -> int:
        return sum(length for _, _, length in self.ranges)

    def wait_for(self, size: int) -> None:
        end = time.monotonic() + 20
        while self.bytes < size and time.monotonic() < end:
            time.sleep(0.001)


def files(directory: Path) -> tuple[Path, Path]:
    paths = directory / "a", directory / "b"
    for path in paths:
        path.write_bytes(b"")
    return paths


def test_every_byte_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (a, b), asked = files(tmp_path), Asked(monkeypatch)
    ranges = [(b, 100, 100 + 2 * STEP + 7), (a, 0, 5), (b, 8, 100)]
    size = 2 * STEP + 7 + 5 + 92
    with ReadAhead(ranges):
        asked.wait_for(size)
    assert asked.ranges == [
        ("b", 100, STEP), ("b", 100 + STEP, STEP), ("b", 100 + 2 * STEP, 7), ("a", 0, 5), ("b", 8, 92),
    ]  # fmt: skip
    assert asked.bytes == size


def test_no_further_than_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (a, _), asked = files(tmp_path), Asked(monkeypatch)
    with ReadAhead([(a, 0, 10 * STEP)], window=3 * STEP) as ahead:
        asked.wait_for(3 * STEP)
        time.sleep(0.05)
        assert asked.bytes == 3 * STEP
        ahead.use(2 * STEP)
        asked.wait_for(5 * STEP)
        time.sleep(0.05)
        assert asked.bytes == 5 * STEP
    assert asked.bytes == 5 * STEP
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}


def test_a_file_that_is_gone_is_for_others_to_tell(tmp_path: Path) -> None:
    with ReadAhead([(tmp_path / "nowhere", 0, STEP)]) as ahead:
        ahead.use(STEP)

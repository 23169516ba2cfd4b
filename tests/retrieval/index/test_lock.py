"""The lock between searches and changes."""

import threading
import time
from collections.abc import Callable

from millrace.retrieval.index.lock import ReadWriteLock


def started(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_readers_together_writers_alone() -> None:
    lock, inside, wrong, most = ReadWriteLock(), [0, 0], list[str](), [0]
    counting = threading.Lock()

    def visit(kind: int) -> None:
        for _ in range(200):
            with lock.write() if kind else lock.read():
                with counting:
                    inside[kind] += 1
                    most[0] = max(most[0], inside[0])
                    if inside[1] > 1 or (inside[1] and inside[0]):
                        wrong.append(f"{inside}")
                time.sleep(0)
                with counting:
                    inside[kind] -= 1

    threads = [started(lambda kind=kind: visit(kind)) for kind in (0, 0, 0, 0, 1, 1)]  # type: ignore[misc]
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert inside == [0, 0]
    assert most[0] > 1


def test_a_reader_waits_for_one_writer_at_most() -> None:
    """Also if writers come without a pause."""
    lock, stop = ReadWriteLock(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            with lock.write():
                time.sleep(0.002)

    threads = [started(write) for _ in range(2)]
    waits = []
    for _ in range(20):
        start = time.monotonic()
        with lock.read():
            waits.append(time.monotonic() - start)
        time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert sorted(waits)[10] < 0.05


def test_a_writer_waits_for_no_reader_that_comes_later() -> None:
    lock, stop, reads = ReadWriteLock(), threading.Event(), [0]

    def read() -> None:
        while not stop.is_set():
            with lock.read():
                time.sleep(0.002)
                reads[0] += 1

    threads = [started(read) for _ in range(4)]
    time.sleep(0.02)
    start = time.monotonic()
    for _ in range(10):
        with lock.write():
            pass
    took = time.monotonic() - start
    stop.set()
    for thread in threads:
        thread.join(10)
    assert took < 2
    assert reads[0] > 4


def test_an_error_inside_releases() -> None:
    lock = ReadWriteLock()
    for side in (lock.read, lock.write) * 2:
        try:
            with side():
                raise KeyError
        except KeyError:
            pass
    with lock.write():
        pass

"""How a server is told to end, and how it ends when nothing else helps."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable


def stop_signal(tidy: Callable[[], None]) -> asyncio.Future[None]:
    """Resolves with the first SIGTERM or SIGINT; the second ends the process at once, after `tidy`."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal(number: int) -> None:
        if stop.done():
            end_now(128 + number, tidy)
        stop.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def arm_watchdog(seconds: float, tidy: Callable[[], None]) -> None:
    """Shutting down gRPC can hang; the process then ends all the same, with status 1."""
    timer = threading.Timer(seconds, end_now, (1, tidy))
    timer.daemon = True
    timer.start()


def end_now(status: int, tidy: Callable[[], None]) -> None:
    tidy()
    os._exit(status)

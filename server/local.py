"""A server of one's own for the time of a command."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from millrace.server.errors import MillraceError

READY = re.compile(r"grpc://(\S+)|(grpcs://\S+)")
STOP_TIMEOUT = 60.0  # seconds
PROBE_TIMEOUT = 2.0  # seconds
SERVE = (sys.executable, "-m", "millrace.server", "serve")
# What the command itself decides; the rest of the environment's settings holds for this server too.
OWN_FLAGS = ("--host=127.0.0.1", "--port=0", "--metrics-port=0", "--log-level=warning")


class LocalServerFailed(MillraceError):
    """`told`: the server has said why on standard error."""

    def __init__(self, message: str, *, told: bool = False):
        super().__init__(message)
        self.told = told


def listens(address: str) -> bool:
    """Whether anything accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), PROBE_TIMEOUT):
            return True
    except OSError:
        return False


@contextmanager
def local_server(*flags: str, say: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """Run `millrace serve` on free ports; yield its address; stop it by SIGTERM. `say` gets the lines that it prints.

    However this process ends, the server ends too. Call it in the main thread. Raises LocalServerFailed.
    """
    command = [*SERVE, f"--parent-pid={os.getpid()}", *OWN_FLAGS, *flags]
    # A group of its own: the Ctrl-C of a terminal is for this process, which then stops the server in its turn.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            yield _wait_until_ready(process, say)
        except BaseException:
            _stop(process)
            raise
        if status := _stop(process):
            raise LocalServerFailed(f"the server ended with status {status}")


def _wait_until_ready(process: "subprocess.Popen[str]", say: Callable[[str], None]) -> str:
    """Its output says where it listens. If it ends instead with status 1, it has said why."""
    assert process.stdout
    for line in process.stdout:
        say(line.rstrip())
        if found := READY.search(line):
            return found[1] or found[2]
    status = process.wait()
    raise LocalServerFailed(f"the server did not start (status {status})", told=status == 1)


def _stop(process: "subprocess.Popen[str]") -> int:
    """Its exit status. It is gone afterwards, also if this is interrupted."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise LocalServerFailed(f"the server did not stop within {STOP_TIMEOUT:.0f} seconds") from None
    finally:
        process.kill()

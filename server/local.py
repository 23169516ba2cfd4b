"""A server of one's own for the time of a command."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from millrace.server.errors import MillraceError

READY = re.compile(r"grpc://(\S+)")
STOP_TIMEOUT = 60.0
PROBE_TIMEOUT = 2.0


class LocalServerFailed(MillraceError):
    pass


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

    Raises LocalServerFailed; what was wrong, the server has said on standard error.
    """
    command = [sys.executable, "-m", "millrace.server.cli", "serve", "--port", "0", "--metrics-port", "0"]
    command += ["--log-level", "warning", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _wait_until_ready(process, say)
            process.send_signal(signal.SIGTERM)
            if status := process.wait(STOP_TIMEOUT):
                raise LocalServerFailed(f"the server ended with status {status}")
        except subprocess.TimeoutExpired:
            raise LocalServerFailed(f"the server did not stop within {STOP_TIMEOUT:.0f} seconds") from None
        finally:
            process.kill()


def _wait_until_ready(process: "subprocess.Popen[str]", say: Callable[[str], None]) -> str:
    """Its output says where it listens; if it ends instead, it has said why."""
    assert process.stdout
    for line in process.stdout:
        say(line.rstrip())
        if found := READY.search(line):
            return found[1]
    raise LocalServerFailed(f"the server did not start (status {process.wait()})")

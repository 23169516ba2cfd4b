"""A real server in a process of its own, on a real port, spoken to with plain stubs."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from millrace.v1 import generation_pb2 as pb
from millrace.v1 import generation_pb2_grpc, model_pb2_grpc

READY = re.compile(r"grpc://127\.0\.0\.1:(\d+)")
METRICS = re.compile(r"http://127\.0\.0\.1:(\d+)/metrics")


class Server:
    """`millrace serve` with captured output."""

    def __init__(self, *flags: str, wait: bool = True, environment: dict[str, str] | None = None):
        self._data = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "millrace.server.cli", "serve", "--port", "0", "--metrics-port", "0", *flags]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "MILLRACE_DATA_DIR": self._data.name}
            | (environment or {}),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.port = int(self.find(READY))
            self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
            self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
            self.models = model_pb2_grpc.ModelServiceStub(self.channel)
            self.address = f"127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def find(self, pattern: re.Pattern[str], timeout: float = 90) -> str:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if match := pattern.search(self.output):
                return match[1]
            if self.process.poll() is not None:
                self._reader.join(5)
                if not pattern.search(self.output):
                    break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern.pattern!r} in the server's output:\n{self.output}")

    def metric(self, name: str) -> float:
        url = f"http://127.0.0.1:{self.find(METRICS)}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        values = [line.split()[-1] for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line)]
        assert values, f"no metric {name} in\n{text}"
        return sum(float(value) for value in values)

    def worker_pids(self) -> list[int]:
        """The worker processes that live under this server."""
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if int(stat[1]) == self.process.pid and b"worker" in command and stat[0] != "Z":
                    pids.append(int(entry.name))
        return pids

    def stop(self, timeout: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the server did not stop:\n{self.output}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if hasattr(self, "channel"):
            self.channel.close()
        self._reader.join(5)
        assert self.process.stdout
        self.process.stdout.close()
        self._data.cleanup()


@pytest.fixture(scope="module")
def start_server() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*flags: str, **options: object) -> Server:
        servers.append(Server(*flags, **options))  # type: ignore[arg-type]  # passed through
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def builtin(start_server: Callable[..., Server]) -> Server:
    """The built-in model; its name for clients is "builtin"."""
    return start_server()


def text_request(prompt: str, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="builtin", text=prompt, **fields)


@pytest.fixture(scope="session")
def make_request() -> Callable[..., pb.GenerateRequest]:
    return text_request

"""Killed workers, drains and wrong starts, seen from outside."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from millrace.server.config import BUILTIN
from millrace.v1 import generation_pb2 as pb

ENDLESS = pb.StoppingCriteria(max_output_tokens=900, ignore_eos=True)


def reason(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)
    infos = [d for d in status.details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1, "exactly one ErrorInfo"
    info = error_details_pb2.ErrorInfo()
    infos[0].Unpack(info)
    return info.reason


class Reader(threading.Thread):
    """Follows one stream to its end."""

    def __init__(self, server, request):
        super().__init__(daemon=True)
        self.server, self.request = server, request
        self.events: list[pb.StreamGenerateResponse] = []
        self.error: grpc.RpcError | None = None
        self.begun = threading.Event()
        self.start()

    def run(self):
        try:
            for event in self.server.generation.StreamGenerate(self.request, timeout=120):
                self.events.append(event)
                if event.WhichOneof("event") == "deltas":
                    self.begun.set()
        except grpc.RpcError as error:
            self.error = error
        self.begun.set()


@pytest.mark.slow
def test_killed_worker(start_server, make_request) -> None:
    server = start_server("--resume-timeout", "0")
    states: list[int] = []
    health = health_pb2_grpc.HealthStub(server.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="millrace.v1.GenerationService"))
    threading.Thread(target=lambda: follow(watch, states), daemon=True).start()
    readers = [Reader(server, make_request("The first rule", stopping=ENDLESS)) for _ in range(8)]
    for reader in readers:
        assert reader.begun.wait(60)
    (pid,) = server.worker_pids()
    os.kill(pid, signal.SIGKILL)
    for reader in readers:
        reader.join(30)
        assert not reader.is_alive(), "every stream ends"
        assert reader.error is not None
        assert (reader.error.code(), reason(reader.error)) == (grpc.StatusCode.ABORTED, "ENGINE_LOST")
        assert [e.sequence for e in reader.events] == list(range(1, len(reader.events) + 1))
    request = make_request("It serves", stopping=pb.StoppingCriteria(max_output_tokens=4, ignore_eos=True))
    end = time.monotonic() + 60
    while (refusal := attempt(server, request)) is not None:
        assert refusal in (
            (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING"),
            (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING"),
        )
        assert time.monotonic() < end
        time.sleep(0.2)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    time.sleep(0.5)
    assert states == [serving, not_serving, serving], "health told the truth meanwhile"
    watch.cancel()
    assert server.stop() == 0
    assert server.worker_pids() == []


def attempt(server, request: pb.GenerateRequest) -> tuple[grpc.StatusCode, str] | None:
    """Generate once; None means that it worked."""
    try:
        server.generation.Generate(request, timeout=60)
    except grpc.RpcError as error:
        return error.code(), reason(error)
    return None


def follow(watch, states: list[int]) -> None:
    try:
        for update in watch:
            states.append(update.status)
    except grpc.RpcError:
        pass


@pytest.mark.slow
def test_hung_worker(start_server, make_request) -> None:
    server = start_server("--worker-hang-timeout", "2", "--resume-timeout", "0")
    reader = Reader(server, make_request("The first rule", stopping=ENDLESS))
    assert reader.begun.wait(60)
    (pid,) = server.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    reader.join(30)
    assert reader.error is not None
    assert reason(reader.error) == "ENGINE_LOST"
    assert server.stop() == 0


@pytest.mark.slow
def test_drain_lets_streams_finish(start_server, make_request) -> None:
    server = start_server("--grace", "100")
    stopping = pb.StoppingCriteria(max_output_tokens=60, ignore_eos=True)
    reader = Reader(server, make_request("The first rule", stopping=stopping))
    assert reader.begun.wait(60)
    server.process.send_signal(signal.SIGTERM)
    reader.join(90)
    assert reader.error is None
    assert reader.events[-1].WhichOneof("event") == "completed"
    assert server.process.wait(60) == 0


@pytest.mark.slow
def test_drain_ends_streams_after_the_grace(start_server, make_request) -> None:
    server = start_server("--grace", "0")
    reader = Reader(server, make_request("The first rule", stopping=ENDLESS))
    assert reader.begun.wait(60)
    server.process.send_signal(signal.SIGTERM)
    reader.join(30)
    assert reader.error is not None
    assert (reader.error.code(), reason(reader.error)) == (grpc.StatusCode.ABORTED, "DRAINED")
    assert server.process.wait(30) == 0


def traces(directory: str) -> list[str]:
    """What lies in the TMPDIR of a server, and the processes that work with it."""
    found = os.listdir(directory)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [command] if directory in (command := path.read_bytes().decode(errors="replace")) else []
    return found


@pytest.fixture
def sockets() -> Iterator[str]:
    """A TMPDIR, short enough for sockets."""
    with tempfile.TemporaryDirectory() as directory:
        yield directory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_is_a_clean_end(number: int, start_server, sockets: str) -> None:
    server = start_server(wait=False, environment={"TMPDIR": sockets})
    while not traces(sockets):  # the worker is started before anything else
        assert server.process.poll() is None, server.output
        time.sleep(0.001)
    server.process.send_signal(number)
    assert server.process.wait(60) == 0, server.output
    server._reader.join(5)
    assert (traces(sockets), server.output) == ([], "")


def refused(start_server, *flags: str) -> str:
    """The output of a server that does not start: one line, no traceback, status 1; and nothing stays behind."""
    with tempfile.TemporaryDirectory() as sockets:
        server = start_server(*flags, wait=False, environment={"TMPDIR": sockets})
        assert server.process.wait(60) == 1, server.output
        assert traces(sockets) == []
    server._reader.join(5)
    assert "Traceback" not in server.output
    complaints = [line for line in server.lines if line.startswith("millrace:")]
    assert len(complaints) == 1, server.output
    return complaints[0]


def test_port_in_use(start_server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "--port" in refused(start_server, "--port", str(port))


def test_beyond_loopback_needs_keys(start_server) -> None:
    assert "--api-keys" in refused(start_server, "--host", "0.0.0.0")


def test_no_file_of_keys(start_server, tmp_path: Path) -> None:
    assert "keys.toml" in refused(start_server, "--api-keys", str(tmp_path / "keys.toml"))


def test_unknown_setting(start_server, tmp_path: Path) -> None:
    file = tmp_path / "millrace.toml"
    file.write_text("max_model_length = 5\n")
    assert "max_model_length" in refused(start_server, "--config", str(file))


def test_too_little_memory(start_server) -> None:
    assert "--kv-cache-memory" in refused(start_server, "--kv-cache-memory", "64KiB")
    assert "--kv-cache-memory" in refused(start_server, "--kv-cache-memory", "9000GiB")


def damage(directory: Path, kind: str) -> None:
    weights = directory / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "missing":
        weights.unlink()
    elif kind == "architecture":
        config = directory / "config.json"
        config.write_text(config.read_text().replace("LlamaForCausalLM", "MysteryForCausalLM"))
    elif kind == "shape":
        config = directory / "config.json"
        config.write_text(config.read_text().replace('"intermediate_size": 768', '"intermediate_size": 512'))
    elif kind == "tokenizer":
        (directory / "tokenizer.json").write_text("{")
    elif kind == "directory":
        shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "missing", "architecture", "shape", "tokenizer", "directory"])
def test_damaged_checkpoint(kind: str, start_server, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(BUILTIN, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    damage(directory, kind)
    assert str(directory) in refused(start_server, "--model", str(directory))

"""The worker as a process, and where it listens."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from link_fakes import ScriptedEngine, collect, script, token_request, worker

from millrace.server.backends.credentials import channel_credentials
from millrace.server.backends.worker_client import EngineClient
from millrace.server.config import SupervisorConfig
from millrace.server.errors import AddressInUse, ConfigError, EngineLost, Unavailable
from millrace.server.worker.listen import TLSFiles, bind
from millrace.server.worker.main import parse_arguments, read_engine_config, read_tls, report_loading

WORKER = [sys.executable, str(Path(__file__).parents[1] / "scripted_worker.py")]


class Process:
    def __init__(self, *arguments: str):
        self.popen = subprocess.Popen([*WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def event(self) -> dict[str, Any]:
        assert self.popen.stdout
        line = self.popen.stdout.readline()
        return json.loads(line) if line else {}

    def address(self) -> str:
        while (event := self.event())["event"] != "ready":
            pass
        return str(event["address"])

    def end(self) -> tuple[int, str]:
        """Exit status and standard error."""
        _, errors = self.popen.communicate(timeout=30)
        return self.popen.returncode, errors


@contextmanager
def started(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


def model(name: str) -> list[str]:
    return ["--engine-config", json.dumps({"model": name})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "127.0.0.1:0"], "needs --tls-cert, --tls-key and --tls-ca"),
        (["--listen", "unix:{}", *model("broken")], "model.safetensors ends too early: fetch it again"),
    ],
)
def test_a_start_that_cannot_be_is_one_line_and_status_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    with started(*(argument.replace("{}", f"{tmp_path}/s") for argument in arguments)) as process:
        events = list(iter(process.event, {}))
        assert events[-1]["event"] == "failed"
        assert message in events[-1]["message"]
        assert "\n" not in events[-1]["message"]
        assert process.end() == (1, f"millrace: {events[-1]['message']}\n")


def test_a_gateway_says_itself_why_its_worker_does_not_start(tmp_path: Path) -> None:
    with started("--listen", f"unix:{tmp_path}/s", "--parent-pid", str(os.getpid()), *model("broken")) as process:
        assert process.end() == (1, "")


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("nowhere", "write unix:PATH or HOST:PORT"),
        ("127.0.0.1:65536", "write unix:PATH or HOST:PORT"),
        (":5", "write unix:PATH or HOST:PORT"),
        ("unix:/nowhere/at/all", "no directory /nowhere/at"),
        ("unix:" + "x" * 200, "too long"),
    ],
)
async def test_addresses_that_are_none_are_refused(listen: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(grpc.aio.server(), listen, None)


@pytest.mark.parametrize(
    ("text", "message"), [('{"max_num_seqs": 0}', "max_num_seqs"), ("{", "JSON"), ('{"colour": 1}', "colour")]
)
def test_engine_settings_are_checked(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--engine-config.*{message}"):
        read_engine_config(text)


def test_tls_files_belong_together() -> None:
    with pytest.raises(ConfigError, match="belong together"):
        read_tls(parse_arguments(["--listen", "127.0.0.1:0", "--tls-cert", "x.pem"]))


def test_loading_counts_up_from_one_model_to_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    progress = report_loading()
    for done, total in ((10, 1000), (11, 1000), (1000, 1000), (2000, 3000), (2001, 3000), (3000, 3000)):
        progress(done, total)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["done"], event["total"]) for event in events] == [
        (10, 1000), (1000, 1000), (3000, 4000), (4000, 4000)
    ]  # fmt: skip


def test_a_bug_while_loading_is_a_traceback_for_the_log_and_a_line_for_the_gateway(tmp_path: Path) -> None:
    with started("--listen", f"unix:{tmp_path}/s", *model("buggy")) as process:
        *_, last = iter(process.event, {})
        assert last == {"event": "failed", "message": "a bug in the worker: KeyError, see the traceback above"}
        status, errors = process.end()
        assert status == 1
        assert "KeyError: 'weights'" in errors


def test_a_worker_whose_parent_is_gone_does_not_start(tmp_path: Path) -> None:
    with started("--listen", f"unix:{tmp_path}/s", "--parent-pid", "1") as process:
        assert process.end() == (1, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_worker_with_status_0(number: int, tmp_path: Path) -> None:
    with started("--listen", f"unix:{tmp_path}/s") as process:
        assert process.event() == {"event": "loading", "done": 50, "total": 200}
        assert process.event() == {"event": "loading", "done": 200, "total": 200}
        assert process.event() == {"event": "ready", "address": f"unix:{tmp_path}/s"}
        process.popen.send_signal(number)
        assert process.end() == (0, "")
        assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_a_worker_that_loads(tmp_path: Path) -> None:
    with started("--listen", f"unix:{tmp_path}/s", *model("slow-load")) as process:
        process.event()
        process.popen.terminate()
        assert process.end() == (0, "")


@pytest.mark.parametrize("grace", ["30", "0.2"])
async def test_sigterm_lets_live_streams_end_within_the_grace(grace: str, tmp_path: Path) -> None:
    with started("--listen", f"unix:{tmp_path}/s", "--grace", grace, *model("0.01")) as process:
        client = EngineClient()
        await client.connect(await asyncio.to_thread(process.address))
        stream = await client.generate(token_request(1, 60))
        process.popen.terminate()
        if grace == "30":
            assert (await collect(stream))[0] == {0: script([1], 0, 60)}
        else:
            with pytest.raises(EngineLost):
                await collect(stream)
        assert (await asyncio.to_thread(process.end)) == (0, "")
        await client.close()


async def test_a_second_signal_ends_at_once_and_health_is_told(tmp_path: Path) -> None:
    with started("--listen", f"unix:{tmp_path}/s", "--grace", "3600", *model("0.01")) as process:
        client = EngineClient()
        address = await asyncio.to_thread(process.address)
        await client.connect(address)
        stream = await client.generate(token_request(1, 50_000))
        async with grpc.aio.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            process.popen.terminate()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await anext(stream)
        process.popen.terminate()
        assert (await asyncio.to_thread(process.end))[0] == 128 + signal.SIGTERM
        await client.close()


def test_an_end_that_takes_too_long_is_a_failure() -> None:
    program = "import time; from millrace.server.worker.main import arm_watchdog; arm_watchdog(0.01); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 1


async def test_a_socket_belongs_to_one_worker(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    async with worker(ScriptedEngine(), f"unix:{path}") as served:
        assert path.stat().st_mode & 0o777 == 0o600
        other = grpc.aio.server()
        with pytest.raises(AddressInUse, match="another worker"):
            bind(other, f"unix:{path}", None)
        client = EngineClient()
        await client.connect(served.address)
        await client.close()
    path.write_text("precious")
    with pytest.raises(AddressInUse, match="no socket"):
        bind(other, f"unix:{path}", None)
    assert path.read_text() == "precious"


class Authority:
    """A certificate authority of a test, and what it signs."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
        self.ca = self._write("ca.pem", self._sign(self.name, self.key, authority=True))

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._write(f"{name}.pem", self._sign(subject, key)), self._write(f"{name}.key", private)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool = False) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder(self.name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        return path


@asynccontextmanager
async def tls_worker(authority: Authority) -> AsyncIterator[str]:
    cert, key = authority.issue("worker")
    async with worker(ScriptedEngine(), "127.0.0.1:0", TLSFiles(cert, key, authority.ca)) as served:
        assert not served.address.endswith(":0")
        yield served.address


def config(address: str, authority: Authority, identity: tuple[Path, Path]) -> SupervisorConfig:
    cert, key = identity
    return SupervisorConfig(worker=address, worker_ca=authority.ca, worker_cert=cert, worker_key=key)


async def test_tcp_links_take_mutual_tls_only(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    async with tls_worker(ours) as address:
        client = EngineClient(channel_credentials(config(address, ours, ours.issue("gateway"))))
        await client.connect(address)
        assert (await collect(await client.generate(token_request(3, 9))))[0] == {0: script([3], 0, 9)}
        await client.close()
        strangers = {
            "a gateway of another authority": channel_credentials(config(address, ours, theirs.issue("gateway"))),
            "a worker of another authority": channel_credentials(config(address, theirs, ours.issue("gateway"))),
            "no certificate": grpc.ssl_channel_credentials(ours.ca.read_bytes()),
            "no TLS": None,
        }
        for who, credentials in strangers.items():
            stranger = EngineClient(credentials)
            # Only who sees the fault itself knows that trying again is vain.
            vain = who == "a worker of another authority"
            with pytest.raises(ConfigError if vain else Unavailable, match="--worker-ca" if vain else "cannot reach"):
                await stranger.connect(address)
            await stranger.close()


def test_tls_files_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--worker-ca"):
        channel_credentials(SupervisorConfig(worker="127.0.0.1:5"))
    missing = tmp_path / "missing"
    files = SupervisorConfig(worker="127.0.0.1:5", worker_ca=missing, worker_cert=missing, worker_key=missing)
    with pytest.raises(ConfigError, match="No such file"):
        channel_credentials(files)
    with pytest.raises(ConfigError, match="No such file"):
        TLSFiles(missing, missing, missing).credentials()


async def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    cert, key = authority.issue("worker")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressInUse, match=address):
            bind(grpc.aio.server(), address, TLSFiles(cert, key, authority.ca))

"""Who gets in, what strangers can cost, and every wrong way to listen."""

import asyncio
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from millrace.server.api import endpoint, methods, server
from millrace.server.api.listen import check_exposure, credentials
from millrace.server.config import ServerConfig
from millrace.server.errors import AddressInUse, ConfigError, StartupError
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2

MIB = 2**20
GENERATE = "/millrace.v1.GenerationService/Generate"
CHECK = "/grpc.health.v1.Health/Check"
KEY = (("authorization", "Bearer good"),)
ASK = pb.GenerateRequest(model="builtin", text="Hello")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@asynccontextmanager
async def uploads(house, path: str, key: str = "", seconds: float = 3, streams: int = 50):
    """Four connections of unfinished uploads from another process; yields bytes sent and calls ended."""
    size = house.server.max_request_bytes
    script = str(Path(__file__).with_name("unfinished.py"))
    arguments = [str(x) for x in (house.port, path, 4, streams, size, seconds, key)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        sent, ended = (await process.stdout.readline()).split()
        yield int(sent), int(ended)
    finally:
        process.stdin.close()
        await process.wait()


async def test_uploads_without_a_key_never_reach_memory(open_house) -> None:
    async with open_house(keys=True, max_context=2**18) as house:
        await house.generation.Generate(ASK, metadata=KEY)
        before = resident()
        async with uploads(house, GENERATE) as (_, ended):
            assert ended == 200, "every call is refused on its headers"
            assert resident() - before < 32 * MIB < 200 * house.server.max_request_bytes / 4


async def test_uploads_with_a_key_are_read_a_few_at_a_time_and_not_for_ever(open_house, monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_BODIES", 8)
    monkeypatch.setattr(endpoint, "BODY_TIMEOUT", 4.0)
    async with open_house(keys=True, max_context=2**18) as house:
        await house.generation.Generate(ASK, metadata=KEY)
        before = resident()
        async with uploads(house, GENERATE, "Bearer good") as (_, ended):
            assert ended < 200
            assert resident() - before < 48 * MIB < 200 * house.server.max_request_bytes / 4
        assert (await house.generation.Generate(ASK, metadata=KEY, timeout=30)).choices


async def test_unfinished_public_calls_end_and_others_pass(open_house, monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "BODY_TIMEOUT", 0.3)
    async with open_house() as house, uploads(house, CHECK, seconds=2, streams=25) as (_, ended):
        assert ended == 100
        answer = await health_pb2_grpc.HealthStub(house.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_public_calls_that_never_go_on_keep_nobody_out(open_house) -> None:
    """Of 500 unfinished health checks a few are kept, and none of them for long while others come."""
    async with open_house(max_context=2**18) as house:
        stub = health_pb2_grpc.HealthStub(house.channel)
        before = resident()
        async with uploads(house, CHECK, seconds=2, streams=125) as (_, ended):
            assert ended == 500 - endpoint.MAX_STRANGERS
            assert resident() - before < 500 * house.server.max_request_bytes / 4
            for _ in range(20):
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_decompression_bomb_is_refused(house) -> None:
    bomb = pb.GenerateRequest(model="builtin", text="a" * (4 * MIB))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await house.generation.Generate(bomb, compression=grpc.Compression.Gzip)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not house.backend.requests


OURS = [
    (f"/{service.full_name}/{method.name}", method.server_streaming)
    for service in methods.SERVICES
    for method in service.methods
    if methods.POLICIES[f"/{service.full_name}/{method.name}"] is endpoint.Policy.TENANT
]


@pytest.mark.parametrize(("path", "streams"), OURS)
@pytest.mark.parametrize("header", [None, "Bearer bad", "good", "", "Bearer good,Bearer bad"])
async def test_every_tenant_method_needs_a_key(open_house, reason_of, path: str, streams: bool, header) -> None:
    async with open_house(keys=True) as house:
        metadata = () if header is None else [("authorization", part) for part in header.split(",")]
        kind = house.channel.unary_stream if streams else house.channel.unary_unary
        call = kind(path)(b"not even a message", metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (call.read() if streams else call)
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert reason_of(raised.value).reason == "UNAUTHENTICATED"


async def test_the_caller_is_who_the_key_says(open_house) -> None:
    async with open_house(keys=True) as house:
        await house.generation.Generate(ASK, metadata=KEY)
        assert house.backend.requests[0].tenant == "acme"
    async with open_house() as house:
        await house.generation.Generate(ASK)
        assert house.backend.requests[0].tenant == "default"


async def test_health_needs_no_key(open_house) -> None:
    async with open_house(keys=True) as house:
        stub = health_pb2_grpc.HealthStub(house.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


def test_a_method_without_a_policy_stops_the_start() -> None:
    with pytest.raises(StartupError, match=r"ModelService/ListModels has no policy"):
        list(methods.methods(methods.MODEL, object(), {"/millrace.v1.ModelService/GetModel": endpoint.Policy.TENANT}))


def test_the_table_names_only_methods_that_exist() -> None:
    served = {f"/{service.full_name}/{method.name}" for service in methods.SERVICES for method in service.methods}
    assert set(methods.POLICIES) == served


async def test_a_port_in_use_is_said_plainly(open_house) -> None:
    async with open_house() as first:
        with pytest.raises(AddressInUse, match=rf"port {first.port} on 127\.0\.0\.1 is in use.*--port"):
            async with open_house(port=first.port):
                pass


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
async def test_an_address_that_is_not_ours(open_house, host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=host.replace(".", r"\.")):
        async with open_house(host=host, api_keys=tmp_path, allow_plaintext=True):
            pass


def config(**settings: object) -> ServerConfig:
    return ServerConfig.model_validate(settings)


def test_beyond_loopback_takes_keys_and_tls(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_exposure(config(host=host))
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="--api-keys"):
            check_exposure(config(host=host, allow_plaintext=True))
        with pytest.raises(ConfigError, match="--tls-cert"):
            check_exposure(config(host=host, api_keys=tmp_path))
        check_exposure(config(host=host, api_keys=tmp_path, allow_plaintext=True))
        check_exposure(config(host=host, api_keys=tmp_path, tls_cert=tmp_path, tls_key=tmp_path))


def test_half_a_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="together"):
        credentials(config(tls_cert=tmp_path / "cert"))
    with pytest.raises(ConfigError, match="--tls-client-ca needs"):
        credentials(config(tls_client_ca=tmp_path / "ca"))
    with pytest.raises(ConfigError, match=r"--tls-key .*missing: No such file"):
        credentials(config(tls_cert=tmp_path / "cert", tls_key=tmp_path / "missing"))


async def test_files_that_are_no_certificates(open_house, tmp_path: Path) -> None:
    (tmp_path / "pem").write_text("not a certificate")
    with pytest.raises(ConfigError, match="PEM"):
        async with open_house(tls_cert=tmp_path / "pem", tls_key=tmp_path / "pem"):
            pass


async def test_connections_beyond_the_limit_are_closed(open_house) -> None:
    async with open_house(max_connections=2) as house:
        await house.models.ListModels(model_pb2.ListModelsRequest())
        sockets = [socket.create_connection(("127.0.0.1", house.port)) for _ in range(4)]
        loop = asyncio.get_running_loop()
        for one in sockets:
            one.setblocking(False)
        closed = 0
        for one in sockets:
            try:
                async with asyncio.timeout(1):
                    closed += await loop.sock_recv(one, 100) == b""
            except TimeoutError:
                pass
            except ConnectionError:
                closed += 1
        for one in sockets:  # not before: each that closes leaves its place to another
            one.close()
        assert closed == 3


@pytest.mark.parametrize(("interval", "welcome"), [(10, True), (10_000, False)])
async def test_clients_may_ping_as_often_as_said(open_house, monkeypatch, interval: int, welcome: bool) -> None:
    """gRPC ignores options it does not know, and by default cuts off whoever pings twice in five minutes."""
    monkeypatch.setattr(server, "MIN_PING_MS", interval)
    async with open_house() as house:
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        reading = asyncio.create_task(reader.read(-1))
        for _ in range(12):
            writer.write(bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + bytes(8))
            await asyncio.sleep(0.03)
            if reading.done():
                break
        else:
            writer.write_eof()
        assert (b"too_many_pings" not in await reading) is welcome
        writer.close()

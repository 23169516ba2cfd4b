"""Requests that are cancelled at any point leave nothing behind: no block, no slot, no task, no descriptor."""

import asyncio
import os
import random
import time
from pathlib import Path

import grpc.aio
import pytest

from millrace.v1 import generation_pb2 as pb
from millrace.v1 import generation_pb2_grpc

REQUESTS = int(os.environ.get("TEST_REQUESTS", "3000"))
CALLERS = 64


def descriptors(server) -> list[int]:
    """How many the gateway and its worker hold."""
    return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (server.process.pid, *server.worker_pids())]


def threads(server) -> list[int]:
    return [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in (server.process.pid, *server.worker_pids())]


def counts(server) -> dict[str, object]:
    names = ("num_requests_running", "num_requests_waiting", "num_tokens_waiting", "kv_cache_usage_perc", "tasks")
    return {name: server.metric(f"millrace_{name}") for name in names} | {
        "descriptors": descriptors(server),
        "threads": threads(server),
    }


class Traffic:
    """`asked` requests, of which `cancelled` were not read to their end."""

    def __init__(self, server, make_request, seed: int):
        self._server, self._make, self._draw = server, make_request, random.Random(seed)
        self.asked = self.cancelled = 0

    def request(self) -> pb.GenerateRequest:
        r = self._draw
        return self._make(
            r.choice(["a mill", "a request", "pages of a cache"]) * r.choice([1, 1, 8]),
            sampling=pb.SamplingParams(seed=self.asked, n=r.choice([1, 1, 1, 2])),
            stopping=pb.StoppingCriteria(max_output_tokens=r.choice([1, 3, 8]), ignore_eos=True),
            request_id=r.choice(["", "", f"job-{self.asked}"]),
        )

    async def ask(self, stub: generation_pb2_grpc.GenerationServiceStub) -> None:
        r = self._draw
        cancels = r.random() < 0.3
        self.asked, self.cancelled = self.asked + 1, self.cancelled + cancels
        call = stub.StreamGenerate(self.request(), timeout=r.choice([60, 0.004]) if cancels else 60)
        messages = r.choice([0, 1, 2, 3]) if cancels else 1000
        try:
            if cancels and r.random() < 0.5:
                await asyncio.sleep(r.choice([0, 0.001, 0.01]))
            while messages and await call.read() is not grpc.aio.EOF:
                messages -= 1
        except grpc.aio.AioRpcError:
            if not cancels:
                raise
        finally:
            call.cancel()

    async def run(self, count: int) -> None:
        last = self.asked + count

        async def caller() -> None:
            while self.asked < last:
                await self.ask(stub)

        async with grpc.aio.insecure_channel(self._server.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            await asyncio.gather(*(caller() for _ in range(CALLERS)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_count_comes_back(start_server, make_request) -> None:
    server = start_server("--max-num-seqs", "16")
    traffic = Traffic(server, make_request, 1)
    asyncio.run(traffic.run(500))
    baseline = settled(server, None)
    assert (baseline["num_requests_running"], baseline["kv_cache_usage_perc"]) == (0, 0)
    asyncio.run(traffic.run(REQUESTS))
    assert settled(server, baseline) == baseline
    assert traffic.cancelled > 0.25 * traffic.asked
    assert server.stop() == 0


def settled(server, wanted: dict[str, object] | None) -> dict[str, object]:
    """The counts once they are as wanted, or stand still for a second."""
    found, since = counts(server), time.monotonic()
    while found != wanted and time.monotonic() < since + 1:
        time.sleep(0.1)
        if (now := counts(server)) != found:
            found, since = now, time.monotonic()
    return found

"""The benchmark of the stream path counts what it says it counts."""

import subprocess
import sys

import grpc

from millrace.bench.free_tokens import server_process
from millrace.bench.stream import Client


async def test_every_token_arrives_in_messages_of_the_size_asked_for() -> None:
    with server_process() as (port, pid):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            client = Client(channel, pid)
            single = await client.run(20, rate=20, tokens=10, per_message=1)
            merged = await client.run(20, rate=0, tokens=40, chunk=8)
    assert (single.errors, merged.errors) == ({}, {})
    assert (single.tokens, merged.tokens) == (200, 800)
    assert single.messages >= 200
    assert merged.messages <= 20 * (40 / 8 + 2)


def test_the_quick_look_prints_its_tables() -> None:
    command = [sys.executable, "-m", "millrace.bench.stream", "--quick", "--streams", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stderr == ""
    for title in ("64 streams at full speed", "20 open streams at 10 tokens/s", "20 open streams with coalescing"):
        assert title in done.stdout

"""The bare stream path: gateway, text, protobuf, gRPC and a client, without a model.

    python -m millrace.bench.stream [--quick] [--streams 1000]

A server process runs the real API and gateway over a backend whose tokens cost nothing; a client in this
process reads. Three questions, a table for each (about 80 seconds in all, with --quick less than 15):

1. How many messages a second does one core of the server send, one token a message and many?
2. Do the streams hold at 10 tokens a second each?
3. With coalescing, at how many tokens a second do they break? A rate holds if no stream fails, 99 % of the
   gaps between messages are below a second and a stream ends at most a tenth late.

Where client and server share cores, the numbers are lower bounds: see the client's share.
"""

import argparse
import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterable
from dataclasses import dataclass

import grpc
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from millrace.bench.free_tokens import MAX_RATE, server_process
from millrace.v1 import generation_pb2 as pb

MAX_GAP, MAX_LATE = 1.0, 0.1  # seconds; share of the run
MAX_RUN = 60.0  # seconds for all streams of a run, opening included
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Result:
    """What a run yielded, counted from when every stream was open; times in seconds, CPU in cores."""

    streams: int
    errors: dict[str, int]  # by status
    messages: int
    tokens: int
    opening: float
    seconds: float
    late: float  # of the median stream, as a share of its ideal time
    p99_gap: float
    server: float
    client: float

    @property
    def holds(self) -> bool:
        return not self.errors and self.p99_gap < MAX_GAP and self.late < MAX_LATE


class Reader:
    """The client's side of one run."""

    def __init__(self, request: pb.GenerateRequest, streams: int, server_pid: int):
        self._request, self._missing, self._pid = request, streams, server_pid
        self.errors: Counter[str] = Counter()
        self.open_at, self.cpu = time.monotonic(), self.cpu_now()

    async def read(self, call: AsyncIterable[bytes]) -> list[float]:
        """When each message after the first came; nothing if the stream failed or was not whole."""
        times: list[float] = []
        last = b""
        try:
            async for message in call:
                if not last:
                    self._opened()
                else:
                    times.append(time.monotonic())
                last = message
        except grpc.aio.AioRpcError as error:
            self.errors[f"{error.code().name}: {error.details()}"] += 1
            return []
        end = pb.StreamGenerateResponse.FromString(last)
        tokens = self._request.stopping.max_output_tokens
        if end.sequence != 1 + len(times) or end.completed.usage.output_tokens != tokens:
            self.errors["not whole"] += 1
            return []
        return times

    def _opened(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self.open_at, self.cpu = time.monotonic(), self.cpu_now()

    def cpu_now(self) -> tuple[float, float]:
        """CPU seconds so far, of the server and of this process."""
        return cpu_seconds(self._pid), cpu_seconds(os.getpid())


class Client:
    def __init__(self, channel: grpc.aio.Channel, server_pid: int):
        self._pid = server_pid
        # Messages stay bytes: their parsing is the client's cost, not the path's.
        self._call: grpc.aio.UnaryStreamMultiCallable[pb.GenerateRequest, bytes] = channel.unary_stream(
            "/millrace.v1.GenerationService/StreamGenerate", request_serializer=pb.GenerateRequest.SerializeToString
        )

    async def run(self, streams: int, rate: int, tokens: int, chunk: int = 1, per_message: int | None = None) -> Result:
        """`streams` streams of `tokens` tokens each, at `rate` steps a second of `chunk` tokens."""
        request = pb.GenerateRequest(
            model="bench",
            token_ids=pb.TokenIds(ids=[rate, chunk, streams]),
            stopping=pb.StoppingCriteria(max_output_tokens=tokens),
            stream=pb.StreamOptions(max_tokens_per_message=per_message),
        )
        start, reader = time.monotonic(), Reader(request, streams, self._pid)
        arrivals = await asyncio.gather(*(reader.read(self._call(request, timeout=MAX_RUN)) for _ in range(streams)))
        seconds = time.monotonic() - reader.open_at
        server, client = (after - before for after, before in zip(reader.cpu_now(), reader.cpu, strict=True))
        whole = [np.array(times) for times in arrivals if times]
        gaps = np.concatenate([np.diff(times) for times in whole]) if whole else np.zeros(1)
        ideal = tokens / chunk / rate if rate else seconds
        took = float(np.median([times[-1] for times in whole])) - reader.open_at if whole else 0.0
        return Result(
            streams=streams,
            errors=dict(reader.errors),
            messages=sum(map(len, whole)),
            tokens=tokens * len(whole),
            opening=reader.open_at - start,
            seconds=seconds,
            late=took / ideal - 1,
            p99_gap=float(np.quantile(gaps, 0.99)),
            server=server / seconds,
            client=client / seconds,
        )


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right")
    return made


async def throughput(client: Client, tokens: int) -> Table:
    made = table(
        "Messages, 64 streams at full speed", "tokens/message", "messages/s/core", "tokens/s/core", "server", "client"
    )
    for chunk in (1, 4, 16, 64):
        found = await client.run(64, rate=0, tokens=tokens * chunk, chunk=chunk, per_message=chunk)
        busy = found.server * found.seconds
        shown = (f"{found.messages / busy:,.0f}", f"{found.tokens / busy:,.0f}")
        made.add_row(str(chunk), *shown, f"{found.server:.0%}", f"{found.client:.0%}")
    return made


def row(rate: int, found: Result) -> list[str]:
    return [
        f"{rate}",
        f"{found.streams * rate:,}",
        f"{found.streams / found.opening:,.0f}",
        f"{found.tokens / found.messages:.1f}" if found.messages else "-",
        ", ".join(f"{count} x {text}" for text, count in found.errors.items()) or "0",
        f"{1000 * found.p99_gap:.0f} ms",
        f"{100 * found.late:+.1f} %",
        f"{found.server:.0%}",
        f"{found.client:.0%}",
        "yes" if found.holds else "no",
    ]


RATES = ("tokens/s", "in all", "opened/s", "per message", "errors", "p99 gap", "late", "server", "client", "holds")


async def hold(client: Client, streams: int, seconds: float) -> Table:
    made = table(f"{streams:,} open streams at 10 tokens/s, each token a message", *RATES)
    made.add_row(*row(10, await client.run(streams, 10, int(10 * seconds), per_message=1)))
    return made


async def find_break(client: Client, streams: int, seconds: float, deadline: float) -> Table:
    """Raise the rate until it no longer holds, or time is up."""
    made = table(f"{streams:,} open streams with coalescing", *RATES)
    rate, found = 20, None
    while found is None or (found.holds and rate < MAX_RATE and time.monotonic() < deadline):
        found = await client.run(streams, rate, int(rate * seconds))
        made.add_row(*row(rate, found))
        rate *= 2
    return made


async def measure(port: int, pid: int, streams: int, quick: bool, console: Console) -> None:
    end = time.monotonic() + (6 if quick else 70)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        client = Client(channel, pid)
        await client.run(4, rate=0, tokens=50)
        console.print(await throughput(client, 10 if quick else 400))
        console.print(await hold(client, streams, 1 if quick else 10))
        console.print(await find_break(client, streams, 0.5 if quick else 4, end))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m millrace.bench.stream", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a short look, 50 streams")
    parser.add_argument("--streams", type=int, help="open streams (1000; 50 with --quick)")
    arguments = parser.parse_args()
    streams = arguments.streams or (50 if arguments.quick else 1000)
    with server_process() as (port, pid):
        uvloop.run(measure(port, pid, streams, arguments.quick, Console(width=110)))


if __name__ == "__main__":
    main()

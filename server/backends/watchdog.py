"""Tells a slow worker from a hung one: looks at progress inside a step, not at whether a port answers."""

import asyncio
import logging

import grpc

from millrace.engine.v1 import engine_pb2 as pb
from millrace.engine.v1.engine_pb2_grpc import EngineServiceStub

log = logging.getLogger(__name__)


async def watch_progress(stub: EngineServiceStub, hang_timeout: float) -> str | None:
    """Return why the worker counts as hung; None if the connection ended first.

    Hung is: not a word for `hang_timeout` seconds, or busy for as long without progress.
    """
    interval = min(max(hang_timeout / 4, 0.01), 1.0)
    call = stub.WatchProgress(pb.WatchProgressRequest(interval_ms=round(interval * 1000)))
    loop = asyncio.get_running_loop()
    counter, moved = -1, loop.time()
    try:
        while True:
            progress = await read(call, hang_timeout)
            if progress is None:
                return f"the worker says nothing for {hang_timeout:g} s"
            if not progress.busy or progress.counter != counter:
                counter, moved = progress.counter, loop.time()
            elif loop.time() - moved > hang_timeout:
                return f"step {progress.step + 1} of the engine makes no progress for {hang_timeout:g} s"
    except (grpc.aio.AioRpcError, StopAsyncIteration):
        return None
    except Exception:
        log.exception("watching a worker failed")
        return "the worker cannot be watched"
    finally:
        call.cancel()


async def read(
    call: "grpc.aio.UnaryStreamCall[pb.WatchProgressRequest, pb.Progress]", patience: float
) -> pb.Progress | None:
    """The next message, or None after `patience` seconds.

    In two halves: if this process itself stood still, one of them is over at once, with the message
    waiting to be read during the other.
    """
    message = asyncio.ensure_future(anext(aiter(call)))
    try:
        for _ in range(2):
            done, _ = await asyncio.wait({message}, timeout=patience / 2)
            if done:
                return message.result()
        return None
    finally:
        message.cancel()

"""The worker process: `python -m millrace.server.worker.main --listen unix:PATH --engine-config JSON`.

It tells its story on standard output, one JSON object a line, each with an `event`: `loading` (`done` and
`total` bytes), then `ready` (`address`) or `failed` (`message`). Everything else goes to standard error.
"""

import argparse
import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from pydantic import ValidationError

from millrace.engine.v1 import engine_pb2
from millrace.engine.v1.engine_pb2_grpc import add_EngineServiceServicer_to_server
from millrace.server.config import DAY, EngineConfig
from millrace.server.engine.combined import CombinedEngine
from millrace.server.engine.embedding import EmbeddingEngine
from millrace.server.engine.engine import Engine
from millrace.server.errors import ConfigError, StartupError
from millrace.server.worker.engine_thread import EngineThread, StepEngine
from millrace.server.worker.listen import SERVER_OPTIONS, TLSFiles, bind
from millrace.server.worker.parent import die_with
from millrace.server.worker.service import EngineService

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Load = Callable[[EngineConfig, Progress], StepEngine]

SERVICES = ("", engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name)
WATCHDOG = 5.0  # seconds that a clean end may take, once streams are over


def load_engine(config: EngineConfig, progress: Progress) -> StepEngine:
    """Raises StartupErrors."""
    from millrace.server.model.embedder import locate_embedder
    from millrace.server.model.executors import create_embedder, create_executor

    embedding = None
    if directory := locate_embedder(config.embedding_model):
        embedder = create_embedder(config, directory, progress)
        embedding = EmbeddingEngine(embedder.executor, embedder.info, config)
    model = create_executor(config, progress)
    return CombinedEngine(Engine(model.executor, model.info, config), embedding)


def emit(event: str, **values: Any) -> None:
    # One write, so that lines of two threads do not mix.
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def report_loading() -> Progress:
    """A progress callback that says no more than it must: a line for each per cent.

    The bytes of one model, told by another total, count after those of the one before.
    """
    before, current, last = 0, 0, -1

    def progress(done: int, total: int) -> None:
        nonlocal before, current, last
        if total != current:
            before, current = before + current, total
        percent = 100 * (before + done) // max(before + total, 1)
        if percent != last:
            last = percent
            emit("loading", done=before + done, total=before + total)

    return progress


async def serve(
    config: EngineConfig, listen: str, *, tls: TLSFiles | None = None, grace: float = 10, load: Load = load_engine
) -> int:
    """Load, serve until SIGTERM or SIGINT, drain; returns the exit status. Raises StartupErrors.

    After the signal new requests are refused and live ones get `grace` seconds; a second signal ends at once.
    """
    stop = stop_signal()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    address = bind(server, listen, tls)
    thread = EngineThread(lambda: load(config, report_loading()))
    service = EngineService(thread)
    thread.start(service.deliver)
    await first_of(stop, thread.ready)
    if stop.done():
        return 0
    thread.ready.result()

    status = health.HealthServicer()
    for name in SERVICES:
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    add_EngineServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    await server.start()
    emit("ready", address=address)

    await first_of(stop, thread.ended)
    arm_watchdog(grace + WATCHDOG)
    await status.enter_graceful_shutdown()
    if not thread.ended.done():
        await service.drain(grace)
    await server.stop(1)
    thread.close()
    await asyncio.wait({thread.ended})
    if error := thread.ended.exception():
        log.critical("the engine failed", exc_info=error)
        return 1
    return 0


async def first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def stop_signal() -> asyncio.Future[None]:
    """Resolves with the first SIGTERM or SIGINT; the second ends the process."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal(number: int) -> None:
        if stop.done():
            os._exit(128 + number)
        stop.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def arm_watchdog(seconds: float) -> None:
    """Shutting down gRPC can hang; the process then ends all the same, with status 1."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def seconds(text: str) -> float:
    if not 0 <= (value := float(text)) <= DAY:
        raise argparse.ArgumentTypeError(f"must be from 0 to {DAY:g}, is {text}")
    return value


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="millrace worker", description="Run an engine that gateways connect to.")
    parser.add_argument("--listen", required=True, help="unix:PATH, or HOST:PORT with mutual TLS")
    parser.add_argument("--engine-config", default="{}", help="settings of the engine as a JSON object")
    parser.add_argument("--tls-cert", type=Path, help="certificate chain of this worker (PEM)")
    parser.add_argument("--tls-key", type=Path, help="its key (PEM)")
    parser.add_argument("--tls-ca", type=Path, help="CA of the gateways that may connect (PEM)")
    parser.add_argument("--grace", type=seconds, default=10, help="seconds that live requests get after SIGTERM")
    parser.add_argument("--parent-pid", type=int, help="end with this process, which must be the parent")
    return parser.parse_args(argv)


def read_tls(arguments: argparse.Namespace) -> TLSFiles | None:
    given = [arguments.tls_cert, arguments.tls_key, arguments.tls_ca]
    if not any(given):
        return None
    if not all(given):
        raise ConfigError("--tls-cert, --tls-key and --tls-ca belong together")
    return TLSFiles(*given)


def read_engine_config(text: str) -> EngineConfig:
    try:
        return EngineConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--engine-config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def main(argv: Sequence[str], load: Load = load_engine) -> NoReturn:
    """Run a worker, then end the process: 0 after a signal, 128 + its number after a second one, 1 if it cannot
    start, its engine failed or its end takes too long.

    The interpreter is not asked to finish: a thread that loads or computes would keep it from doing so.
    """
    faulthandler.enable()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    arguments = parse_arguments(argv)
    if arguments.parent_pid is not None:
        die_with(arguments.parent_pid)
    code = 1
    try:
        config = read_engine_config(arguments.engine_config)
        tls = read_tls(arguments)
        code = uvloop.run(serve(config, arguments.listen, tls=tls, grace=arguments.grace, load=load))
    except StartupError as error:
        emit("failed", message=str(error))
        if arguments.parent_pid is None:  # else the gateway says it
            print(f"millrace: {error}", file=sys.stderr)
    except Exception as error:
        log.critical("the worker failed", exc_info=error)
        emit("failed", message=f"a bug in the worker: {type(error).__name__}, see the traceback above")
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])

"""How a server starts: with its worker, which loads while the gateway is still being imported."""

import resource
import sys

import uvloop

from millrace.server.backends.worker_process import Launcher
from millrace.server.config import Settings
from millrace.server.ending import stop_signal
from millrace.server.errors import StartupError
from millrace.server.model.hub import locate


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. A StartupError becomes one line on standard error."""
    raise_file_limit()
    try:
        return uvloop.run(start(with_model(settings)))
    except StartupError as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1


def with_model(settings: Settings) -> Settings:
    """The settings with the model's directory; a repository keeps its name. Raises CheckpointError."""
    engine = locate(settings.engine)
    name = settings.server.served_model_name or (settings.engine.model if engine is not settings.engine else None)
    server = settings.server.model_copy(update={"served_model_name": name})
    return settings.model_copy(update={"engine": engine, "server": server})


async def start(settings: Settings) -> int:
    """Raises StartupErrors; whatever happens, the worker ends too."""
    launcher = Launcher(settings.engine)
    stop = stop_signal(launcher.remove_directory)
    try:
        if not settings.supervisor.worker:
            await launcher.launch()
        from millrace.server.app import serve

        if stop.done():
            return 0
        return await serve(settings, launcher, stop)
    finally:
        await launcher.close()


def raise_file_limit() -> None:
    """Every connection is a file; the soft limit is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

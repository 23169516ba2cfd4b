"""Worker processes of this gateway: started with `exec`, never forked, and never left behind."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from typing import Any

from millrace.server.config import EngineConfig
from millrace.server.errors import StartupError

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "millrace.server.worker.main")
GRACE = 5.0  # seconds to end in; by then no stream is left
DUMP = 1.0  # seconds that a hung worker gets to write its stacks


class WorkerProcess:
    def __init__(self, process: Process):
        self._process = process
        self._stories: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, command: Sequence[str], address: str, config: EngineConfig) -> "WorkerProcess":
        """The worker shares this process's standard error, and ends with it."""
        arguments = ["--listen", address, "--engine-config", config.model_dump_json(), "--parent-pid", str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the gateway, which drains first
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def loaded(self, on_loading: Callable[[int, int], None]) -> str:
        """Wait until it serves, and return its address. Raises StartupError with what it said last."""
        while story := await self._story():
            match story:
                case {"event": "loading", "done": int(done), "total": int(total)}:
                    on_loading(done, total)
                case {"event": "ready", "address": str(address)}:
                    self._stories = asyncio.create_task(self._drain())
                    return address
                case {"event": "failed", "message": str(message)}:
                    await self._process.wait()
                    raise StartupError(message)
        raise StartupError(f"the worker ended while loading, {describe_exit(await self._process.wait())}")

    async def ended(self) -> str:
        """Wait until the process is gone, and say how it ended."""
        return describe_exit(await self._process.wait())

    async def dump(self) -> None:
        """Ask for the stacks of all threads on standard error (faulthandler); the process dies of it, or hangs on."""
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            self._process.send_signal(signal.SIGABRT)
            async with asyncio.timeout(DUMP):
                await self._process.wait()

    async def stop(self, grace: float) -> None:
        """SIGTERM, and after `grace` seconds SIGKILL; returns when the process is gone. Idempotent."""
        try:
            if grace > 0 and self._process.returncode is None:
                self._process.terminate()
                async with asyncio.timeout(grace):
                    await self._process.wait()
        except (TimeoutError, ProcessLookupError):
            log.warning("worker %d does not end within %g s: killing it", self.pid, grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            if self._stories is not None:
                await self._stories

    async def _drain(self) -> None:
        """Read on, or a worker that talks would wait for a reader."""
        while story := await self._story():
            log.info("worker %d: %s", self.pid, story)

    async def _story(self) -> dict[str, Any] | None:
        """The next event; None: it says no more."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            with contextlib.suppress(ValueError):
                story = json.loads(line)
                if isinstance(story, dict):
                    return story
            log.warning("worker %d says: %s", self.pid, line.decode(errors="replace").rstrip())
        return None


class Launcher:
    """Starts workers of one configuration, each on a Unix socket of its own in a directory of theirs."""

    def __init__(self, config: EngineConfig, command: Sequence[str] = WORKER):
        """`command` starts a worker."""
        self.config = config
        self.directory: str | None = None
        self.process: WorkerProcess | None = None  # the newest
        self._command = command
        self._generation = itertools.count(1)

    async def launch(self) -> WorkerProcess:
        """Start a worker, which loads on its own."""
        if self.directory is None:
            self.directory = tempfile.mkdtemp(prefix="millrace-")  # only this user may enter
        address = f"unix:{self.directory}/{next(self._generation)}"
        self.process = await WorkerProcess.start(self._command, address, self.config)
        return self.process

    async def close(self) -> None:
        """End the newest worker; those before it are gone. Idempotent."""
        if self.process is not None:
            await self.process.stop(GRACE)
        self.remove_directory()

    def remove_directory(self) -> None:
        """Remove the sockets of workers; all there is to tidy where a process must end at once."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


def describe_exit(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-status).name}{hint}"

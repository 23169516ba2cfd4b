"""Looks after the worker of a gateway: starts it, watches it, replaces it."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

from millrace.server.backends.credentials import channel_credentials
from millrace.server.backends.engine_link import EngineLink
from millrace.server.backends.watchdog import watch_progress
from millrace.server.backends.worker_client import EngineClient
from millrace.server.backends.worker_process import Launcher, WorkerProcess
from millrace.server.config import SupervisorConfig
from millrace.server.errors import ConfigError, StartupError, Unavailable
from millrace.server.types import BackendInfo, EmbedderInfo

log = logging.getLogger(__name__)

OnLoading = Callable[[int, int], None]  # bytes done, bytes in all

FIRST_DELAY, LONGEST_DELAY = 0.2, 10.0  # seconds before a restart, doubled each time
HEALTHY = 60.0  # seconds of service after which the next delay is the first one again
LAST_WORDS = 1.0  # seconds between a link's end and the exit status that explains it


class Supervisor:
    """Keeps `backend` linked to a worker process of its own, or with `config.worker` to one run elsewhere.

    `backend` outlives its workers and tells `on_ready` of each change. Only the first start can fail. A worker
    that runs another checkpoint, or embeds with another model, is never linked to.
    """

    def __init__(
        self,
        launcher: Launcher,
        config: SupervisorConfig,
        checkpoint_digest: str,
        *,
        embedder_revision: str | None = None,
    ):
        """`launcher` starts workers, and may have started the first; where they run elsewhere it starts none.

        `checkpoint_digest`: of the checkpoint that workers must run.
        `embedder_revision`: of the model that they must embed with; None: any, or none.
        Raises ConfigError if TLS files are missing or cannot be read.
        """
        self.backend = EngineClient(channel_credentials(config), config.resume_timeout)
        self.launcher = launcher
        self._config = config
        self._checkpoint_digest, self._embedder_revision = checkpoint_digest, embedder_revision
        self._delays = backoff()
        self._absence = ""  # why there was no worker elsewhere when it was last tried
        self._watch: asyncio.Task[None] | None = None

    async def start(self, on_loading: OnLoading = lambda done, total: None) -> None:
        """Return when `backend` is ready. Raises StartupError; `close` is the caller's all the same."""
        try:
            async with asyncio.timeout(self._config.worker_start_timeout):
                link = await (self._find(self._config.worker) if self._config.worker else self._first(on_loading))
        except TimeoutError:
            patience = f"{self._config.worker_start_timeout:g} s (--worker-start-timeout)"
            cause = f": {self._absence}" if self._absence else ""
            raise StartupError(f"no worker is ready after {patience}{cause}") from None
        except Unavailable as error:
            raise StartupError(str(error)) from error
        self._watch = asyncio.create_task(self._look_after(link))

    async def close(self) -> None:
        """End every stream, then the worker. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self.backend.close()
        await self.launcher.close()

    async def _first(self, on_loading: OnLoading) -> EngineLink:
        return await self._load(self.launcher.process or await self.launcher.launch(), on_loading)

    async def _load(self, process: WorkerProcess, on_loading: OnLoading) -> EngineLink:
        return await self._connect(await process.loaded(on_loading))

    async def _find(self, address: str) -> EngineLink:
        """Link to the worker elsewhere, however long it takes to come up."""
        while True:
            try:
                return await self._connect(address)
            except Unavailable as error:
                self._absence = str(error)
                log.warning("%s", error)
                await asyncio.sleep(next(self._delays))

    async def _connect(self, address: str) -> EngineLink:
        """Raises Unavailable, or ConfigError if the worker is not one for this gateway."""

        def check(info: BackendInfo, embedder: EmbedderInfo | None) -> None:
            if info.checkpoint_digest != self._checkpoint_digest:
                raise ConfigError(
                    f"the worker at {address} runs another model than --model {self.launcher.config.model}: digests of "
                    f"config.json and tokenizer.json are {info.checkpoint_digest} ({info.architecture}) there and "
                    f"{self._checkpoint_digest} here; start both with the same checkpoint"
                )
            if self._embedder_revision not in (None, embedder and embedder.revision):
                there = f"{embedder.revision} ({embedder.name})" if embedder else "none"
                raise ConfigError(
                    f"the worker at {address} embeds with another model than --embedding-model "
                    f"{self.launcher.config.embedding_model}: revisions are {there} there and "
                    f"{self._embedder_revision} here; start both with the same embedding model"
                )

        return await self.backend.connect(address, check)

    async def _look_after(self, link: EngineLink) -> None:
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time()
            log.error("replacing the worker: %s", await self._trouble(link))
            if loop.time() - since >= HEALTHY:
                self._delays = backoff()
            link = await self._replace()

    async def _trouble(self, link: EngineLink) -> str:
        """Wait until the worker is lost or hangs; returns why, with every stream ended and the process gone."""
        hang = asyncio.create_task(watch_progress(link.stub, self._config.worker_hang_timeout))
        try:
            futures: list[asyncio.Future[Any]] = [link.ended, hang]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            why = hang.result() if hang.done() else None  # None: the link ended
            await link.close(why or "the worker is gone")
            process = self.launcher.process
            if process is None:
                return why or link.ended.result()
            if why:
                await process.dump()
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORDS):
                        why = await process.ended()
            await process.stop(grace=0)
            return why or link.ended.result()
        finally:
            hang.cancel()

    async def _replace(self) -> EngineLink:
        while True:
            await asyncio.sleep(next(self._delays))
            try:
                if self._config.worker:
                    return await self._connect(self._config.worker)
                async with asyncio.timeout(self._config.worker_start_timeout):
                    return await self._load(await self.launcher.launch(), lambda done, total: None)
            except Exception as error:  # whatever it is, trying again is all there is
                log.error("no new worker yet: %s", error or type(error).__name__)
                if self.launcher.process is not None:
                    await self.launcher.process.stop(grace=0)


def backoff() -> Iterator[float]:
    """Delays that double up to a longest one, each shortened at random by up to half, in seconds."""
    delay = FIRST_DELAY
    while True:
        yield delay * random.uniform(0.5, 1)
        delay = min(2 * delay, LONGEST_DELAY)

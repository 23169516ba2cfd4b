"""The supervisor over real worker processes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from link_fakes import (
    CRASHES,
    EMBEDDER,
    HANGS,
    INFO,
    ScriptedEngine,
    collect,
    embed_request,
    script,
    script_vector,
    token_request,
    worker,
)

from millrace.server.backends import supervisor as supervision
from millrace.server.backends.continued_stream import MOST_WITHOUT_PROGRESS
from millrace.server.backends.supervisor import FIRST_DELAY, LONGEST_DELAY, Supervisor, backoff
from millrace.server.backends.worker_process import Launcher
from millrace.server.config import EngineConfig, SupervisorConfig
from millrace.server.errors import ConfigError, EngineLost, EngineRestarting, StartupError
from millrace.server.types import EmbedderInfo

WORKER = (sys.executable, str(Path(__file__).parents[1] / "scripted_worker.py"))
DIGEST = INFO.checkpoint_digest


@asynccontextmanager
async def supervised(
    model: str = "0.002", hang_timeout: float = 30, resume_timeout: float = 0
) -> AsyncIterator[Supervisor]:
    launcher = Launcher(EngineConfig(model=model), WORKER)
    config = SupervisorConfig(worker_hang_timeout=hang_timeout, resume_timeout=resume_timeout)
    supervisor = Supervisor(launcher, config, DIGEST)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.close()


def pid_of(supervisor: Supervisor) -> int:
    assert supervisor.launcher.process is not None
    return supervisor.launcher.process.pid


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def modes(directory: str) -> list[int]:
    root = Path(directory)
    return [path.stat().st_mode & 0o777 for path in (root, *root.iterdir())] if root.exists() else []


async def next_readiness(supervisor: Supervisor, ready: bool) -> None:
    seen = asyncio.Event()
    supervisor.backend.on_ready(lambda now: seen.set() if now is ready else None)
    async with asyncio.timeout(30):
        await seen.wait()


async def expect_service(supervisor: Supervisor, first: int) -> None:
    stream = await supervisor.backend.generate(token_request(first, 9))
    assert (await collect(stream))[0] == {0: script([first], 0, 9)}


async def test_loading_is_told_and_the_end_leaves_nothing() -> None:
    loading: list[tuple[int, int]] = []
    supervisor = Supervisor(Launcher(EngineConfig(model="noisy"), WORKER), SupervisorConfig(), DIGEST)
    await supervisor.start(lambda done, total: loading.append((done, total)))
    assert loading == [(50, 200), (200, 200)]
    await expect_service(supervisor, 3)
    pid, directory = pid_of(supervisor), supervisor.launcher.directory
    assert directory is not None
    assert modes(directory) == [0o700, 0o600]  # the directory and the socket in it
    await supervisor.close()
    await supervisor.close()
    assert not is_alive(pid)
    assert modes(directory) == []


@pytest.mark.parametrize(
    ("model", "message"), [("broken", "^model.safetensors ends too early: fetch it again$"), ("buggy", "KeyError")]
)
async def test_a_first_start_that_fails_says_why(model: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        async with supervised(model):
            pass


async def test_a_worker_that_dies_while_loading_is_a_failed_start() -> None:
    supervisor = Supervisor(Launcher(EngineConfig(model="slow-load"), WORKER), SupervisorConfig(), DIGEST)
    start = asyncio.create_task(supervisor.start(lambda done, total: os.kill(pid_of(supervisor), signal.SIGKILL)))
    with pytest.raises(StartupError, match="killed by SIGKILL"):
        await start
    await supervisor.close()


async def test_loading_too_long_is_a_failed_start_and_closing_ends_it() -> None:
    supervisor = Supervisor(
        Launcher(EngineConfig(model="slow-load"), WORKER), SupervisorConfig(worker_start_timeout=2), DIGEST
    )
    with pytest.raises(StartupError, match="--worker-start-timeout"):
        await supervisor.start()
    pid = pid_of(supervisor)
    await supervisor.close()
    assert not is_alive(pid)


async def test_a_killed_worker_is_replaced_and_its_streams_end_once() -> None:
    async with supervised() as supervisor:
        backend, pid = supervisor.backend, pid_of(supervisor)
        started = await backend.generate(token_request(1, 50_000))
        await anext(started)
        unread = await backend.generate(token_request(2, 50_000))
        os.kill(pid, signal.SIGKILL)
        lost = None
        try:
            await collect(started)
        except EngineLost as error:
            lost = error
        assert lost is not None
        assert int(lost.metadata["tokens_delivered"]) > 0
        with pytest.raises(EngineRestarting):
            await anext(unread)
        assert [deltas async for deltas in started] == [deltas async for deltas in unread] == []
        with pytest.raises(EngineRestarting):
            backend.info()
        await next_readiness(supervisor, True)
        assert pid_of(supervisor) != pid
        await expect_service(supervisor, 4)


async def test_streams_of_a_killed_worker_go_on_with_the_next_one() -> None:
    async with supervised("0.01", resume_timeout=30) as supervisor:
        backend, pid = supervisor.backend, pid_of(supervisor)
        streams = [await backend.generate(token_request(i, 100, n=1 + i % 2, queue_timeout=30)) for i in range(1, 7)]
        await anext(streams[0])
        streams[2].stop(1)
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        streams[4].stop(0)  # while nobody computes it
        for i, stream in enumerate(streams[1:], 2):
            tokens, last, _ = await collect(stream)
            whole = [choice for choice, delta in last.items() if delta.finish]
            assert whole == [choice for choice in range(1 + i % 2) if (i, choice) not in ((3, 1), (5, 0))]
            assert {choice: tokens[choice] for choice in whole} == {c: script([i], c, 100) for c in whole}
        assert pid_of(supervisor) != pid


async def test_a_request_that_kills_every_worker_is_given_up() -> None:
    async with supervised(resume_timeout=30) as supervisor:
        deaths = []
        supervisor.backend.on_ready(deaths.append)
        with pytest.raises(EngineRestarting):
            await supervisor.backend.generate(token_request(CRASHES, 5))
        assert 1 <= deaths.count(False) <= 1 + MOST_WITHOUT_PROGRESS
        await next_readiness(supervisor, True)
        await expect_service(supervisor, 5)


async def test_what_is_stopped_while_there_is_no_worker_waits_for_none() -> None:
    async with supervised("0.01", resume_timeout=30) as supervisor:
        stream = await supervisor.backend.generate(token_request(1, 5000, n=2))
        await anext(stream)
        os.kill(pid_of(supervisor), signal.SIGKILL)
        waiting = asyncio.create_task(collect(stream))
        await next_readiness(supervisor, False)
        await asyncio.sleep(0)
        stream.stop(0)
        stream.stop(1)
        async with asyncio.timeout(0.2):
            await waiting


async def test_a_crashed_engine_is_replaced() -> None:
    async with supervised() as supervisor:
        with pytest.raises(EngineRestarting):
            await supervisor.backend.generate(token_request(CRASHES, 5))
        await next_readiness(supervisor, True)
        await expect_service(supervisor, 5)


@pytest.mark.parametrize("how", ["stopped", "step"])
async def test_a_hung_worker_is_replaced(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    async with supervised(hang_timeout=1.5) as supervisor:
        pid = pid_of(supervisor)
        stream = await supervisor.backend.generate(token_request(1, 50_000))
        await anext(stream)
        if how == "stopped":
            os.kill(pid, signal.SIGSTOP)
        else:
            hanging = asyncio.create_task(supervisor.backend.generate(token_request(HANGS, 5)))
            with pytest.raises(EngineRestarting):
                await hanging
        lost = None
        try:
            await collect(stream)
        except EngineLost as error:
            lost = error
        assert lost is not None
        await next_readiness(supervisor, True)
        assert not is_alive(pid)
        await expect_service(supervisor, 6)
    if how == "step":
        assert 'link_fakes.py", line' in capfd.readouterr().err  # the stack of the step that hung


async def test_a_busy_or_idle_worker_is_not_taken_for_a_hung_one() -> None:
    async with supervised("0.1", hang_timeout=0.6) as supervisor:
        pid = pid_of(supervisor)
        await asyncio.sleep(1)
        await expect_service(supervisor, 3)
        assert pid_of(supervisor) == pid


async def test_a_worker_elsewhere_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"unix:{tmp_path}/elsewhere"
    monkeypatch.setattr(supervision, "FIRST_DELAY", 0.02)
    supervisor = Supervisor(Launcher(EngineConfig(), ("false",)), SupervisorConfig(worker=address), DIGEST)
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0.1)
    assert not starting.done()
    for first in (1, 2):
        async with worker(ScriptedEngine(), address):
            await starting if first == 1 else await next_readiness(supervisor, True)
            await expect_service(supervisor, first)
        await next_readiness(supervisor, False)
    await supervisor.close()
    assert supervisor.launcher.process is None


async def test_no_worker_elsewhere_is_a_failed_start(tmp_path: Path) -> None:
    config = SupervisorConfig(worker=f"unix:{tmp_path}/nobody", worker_start_timeout=0.5)
    supervisor = Supervisor(Launcher(EngineConfig()), config, DIGEST)
    with pytest.raises(StartupError, match=r"no worker is ready after 0.5 s .*: cannot reach the worker at unix:"):
        await supervisor.start()
    await supervisor.close()


def other_engine() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.info = replace(INFO, checkpoint_digest="another-digest")
    return engine


async def test_a_worker_of_another_checkpoint_is_a_failed_start(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/other"
    supervisor = Supervisor(Launcher(EngineConfig(model="mine")), SupervisorConfig(worker=address), DIGEST)
    async with worker(other_engine(), address):
        with pytest.raises(ConfigError, match=f"--model mine: .* another-digest .* {DIGEST} here"):
            await supervisor.start()
    await supervisor.close()


async def test_a_worker_that_starts_with_another_checkpoint_is_a_failed_start() -> None:
    supervisor = Supervisor(Launcher(EngineConfig(model="0.002"), WORKER), SupervisorConfig(), "mine")
    with pytest.raises(ConfigError, match=f"{DIGEST} .* mine here"):
        await supervisor.start()
    await supervisor.close()


async def test_a_worker_that_comes_back_with_another_checkpoint_stays_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"unix:{tmp_path}/elsewhere"
    monkeypatch.setattr(supervision, "FIRST_DELAY", 0.02)
    supervisor = Supervisor(Launcher(EngineConfig()), SupervisorConfig(worker=address), DIGEST)
    async with worker(ScriptedEngine(), address):
        await supervisor.start()
    await next_readiness(supervisor, False)
    readiness: list[bool] = []
    supervisor.backend.on_ready(readiness.append)
    async with worker(other_engine(), address), asyncio.timeout(30):
        while sum("another-digest" in text for text in caplog.messages) < 2:  # noqa: ASYNC110 (a log has no event)
            await asyncio.sleep(0.01)
        with pytest.raises(EngineRestarting):
            await supervisor.backend.generate(token_request(1, 5))
    assert not any(readiness)
    async with worker(ScriptedEngine(), address):
        await next_readiness(supervisor, True)
        await expect_service(supervisor, 2)
    await supervisor.close()


@pytest.mark.parametrize(
    ("embedder", "revision", "refusal"),
    [
        (EMBEDDER, None, None),
        (EMBEDDER, EMBEDDER.revision, None),
        (None, None, None),
        (EMBEDDER, "another", r"--embedding-model auto: .* scripted-revision \(scripted-embedder\) there and another"),
        (None, EMBEDDER.revision, "revisions are none there and scripted-revision here"),
    ],
)
async def test_a_worker_that_embeds_with_another_model_is_refused(
    embedder: EmbedderInfo | None, revision: str | None, refusal: str | None, tmp_path: Path
) -> None:
    engine = ScriptedEngine()
    engine.embedder = embedder
    address = f"unix:{tmp_path}/w"
    supervisor = Supervisor(
        Launcher(EngineConfig()), SupervisorConfig(worker=address), DIGEST, embedder_revision=revision
    )
    async with worker(engine, address):
        with pytest.raises(ConfigError, match=refusal) if refusal else contextlib.nullcontext():
            await supervisor.start()
        await supervisor.close()


async def test_a_step_of_texts_that_hangs_replaces_the_worker() -> None:
    async with supervised(hang_timeout=0.5) as supervisor:
        pid = pid_of(supervisor)
        assert await supervisor.backend.embed(embed_request(5)) == [script_vector(5)]
        with pytest.raises(EngineRestarting, match="makes no progress"):
            await supervisor.backend.embed(embed_request(HANGS))
        await next_readiness(supervisor, True)
        assert pid_of(supervisor) != pid
        assert await supervisor.backend.embed(embed_request(5)) == [script_vector(5)]


def test_delays_double_up_to_a_bound_with_jitter() -> None:
    delays = backoff()
    for expected in (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10):
        assert FIRST_DELAY / 2 <= expected / 2 <= next(delays) <= expected <= LONGEST_DELAY


GATEWAY = """
import asyncio, sys
from millrace.server.backends.supervisor import Supervisor
from millrace.server.backends.worker_process import Launcher
from millrace.server.config import EngineConfig, SupervisorConfig

async def main():
    launcher = Launcher(EngineConfig(model=sys.argv[1]), tuple(sys.argv[2:]))
    supervisor = Supervisor(launcher, SupervisorConfig(), "scripted-digest")
    starting = asyncio.create_task(supervisor.start())
    while supervisor.launcher.process is None:
        await asyncio.sleep(0.01)
    if sys.argv[1] != "slow-load":
        await starting
    print(supervisor.launcher.process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("model", ["0.002", "slow-load"])
def test_a_worker_dies_with_its_gateway(model: str) -> None:
    command = [sys.executable, "-c", GATEWAY, model, *WORKER]
    with (
        tempfile.TemporaryDirectory() as directory,  # for what a killed gateway cannot remove; short, as sockets need
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": directory}) as gateway,
    ):
        try:
            assert gateway.stdout is not None
            pid = int(gateway.stdout.readline())
            assert is_alive(pid)
            if model == "0.002":
                os.kill(pid, signal.SIGSTOP)  # even a stopped one must not stay
        finally:
            gateway.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)

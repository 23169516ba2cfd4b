"""How the parts are put together; tests/e2e asks the same of a running server."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeBackend
from rich.console import Console

from millrace.server.app import announce, fitted, follow_worker, read_model, tenant_limits
from millrace.server.config import BUILTIN, EngineConfig, RetrievalConfig, ServerConfig, Settings, SupervisorConfig
from millrace.server.errors import CheckpointError, ConfigError, QuotaExceeded
from millrace.server.gateway.auth import KeyStore, new_key
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.routing import Routes
from millrace.server.start import with_model
from millrace.server.telemetry.metrics import Metrics
from millrace.server.types import EmbedderInfo

WORKER = (sys.executable, str(Path(__file__).parent / "scripted_worker.py"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The built-in checkpoint without its weights."""
    target = tmp_path / "my-model"
    shutil.copytree(BUILTIN, target, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__pycache__"))
    return target


def settings_of(directory: Path | str, **server: object) -> Settings:
    """Settings with a worker elsewhere, so that no weights are needed here."""
    return Settings(
        engine=EngineConfig(model=str(directory)),
        supervisor=SupervisorConfig(worker="unix:/nowhere"),
        server=ServerConfig(**server),
    )


def silent(request, choice):
    return []


def test_card_of_a_checkpoint(directory: Path) -> None:
    card, context = read_model(settings_of(directory), FakeBackend(silent))
    assert (card.name, card.capabilities, context) == ("my-model", ("generate", "chat"), 1024)
    assert (card.default_sampling.top_p, card.stop_token_ids) == (0.9, {0})
    assert read_model(settings_of(directory, served_model_name="nice"), FakeBackend(silent))[0].name == "nice"
    assert read_model(settings_of("builtin"), FakeBackend(silent))[0].name == "builtin"


def test_end_token_from_the_tokenizer_where_nothing_else_names_one(directory: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        values = json.loads((directory / name).read_text())
        del values["eos_token_id"]
        (directory / name).write_text(json.dumps(values))
    assert read_model(settings_of(directory), FakeBackend(silent))[0].stop_token_ids == {0}


def test_missing_weights_are_said_before_a_worker_starts(directory: Path) -> None:
    settings = settings_of(directory).model_copy(update={"supervisor": SupervisorConfig()})
    with pytest.raises(CheckpointError, match=re.escape(str(directory))):
        read_model(settings, FakeBackend(silent))


def test_tenants_limits_come_from_the_key_file_or_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(new_key("acme")[1] + "[tenants.acme]\nmax_concurrent_requests = 1\n")
    limits = tenant_limits(KeyStore.load(path), ServerConfig(max_concurrent_requests=2))
    with limits.admit("acme"):
        with pytest.raises(QuotaExceeded), limits.admit("acme"):
            pass
        with limits.admit("other"), limits.admit("other"), pytest.raises(QuotaExceeded), limits.admit("other"):
            pass


class FakeApi:
    def __init__(self) -> None:
        self.said: list[bool] = []

    def set_ready(self, ready: bool) -> None:
        self.said.append(ready)


def test_health_follows_the_worker_until_the_drain() -> None:
    backend, api, limits = FakeBackend(silent), FakeApi(), Limits(lambda tenant: 1)
    gateway = Gateway(Routes([]), limits, Metrics())
    follow_worker(backend, gateway, api)
    backend.set_ready(False)
    backend.set_ready(True)
    assert api.said == [True, False, True]
    assert gateway.metrics.registry.get_sample_value("millrace_engine_restarts_total") == 1
    limits.refuse()
    backend.set_ready(True)
    assert api.said[-1] is False
    gateway.close()


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({"host": "127.0.0.1"}, ["grpc://127.0.0.1:77", "chat --address 127.0.0.1:77"]),
        ({"host": "0.0.0.0"}, ["grpc://127.0.0.1:77"]),
        ({"host": "::1"}, ["grpc://[::1]:77", "chat --address [::1]:77"]),
        ({"tls_cert": "c.pem", "api_keys": "k"}, ["chat --address grpcs://127.0.0.1:77", "MILLRACE_API_KEY"]),
    ],
)
def test_ready_lines(directory: Path, server: dict[str, object], expected: list[str]) -> None:
    card, _ = read_model(settings_of(directory), FakeBackend(silent))
    out = io.StringIO()
    page = "http://127.0.0.1:9464/metrics"
    announce(Console(file=out, width=20), ServerConfig(**server), card, 77, page)
    for text in [*expected, "model my-model", page]:
        assert text in out.getvalue()


@pytest.mark.parametrize("forced", ["second signal", "watchdog"])
def test_a_forced_end_leaves_no_socket_behind(forced: str, tmp_path: Path) -> None:
    program = f"""
import asyncio, os, signal, time
from millrace.server import ending
from millrace.server.backends.worker_process import Launcher
from millrace.server.config import EngineConfig
async def main():
    launcher = Launcher(EngineConfig(model="2"), {WORKER!r})
    await (await launcher.launch()).loaded(lambda done, total: None)
    assert os.listdir({str(tmp_path)!r})
    stop = ending.stop_signal(launcher.remove_directory)
    os.kill(os.getpid(), signal.SIGTERM)
    await stop
    if {forced!r} == "watchdog":
        ending.arm_watchdog(0.01, launcher.remove_directory)
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert done.returncode == {"second signal": 128 + signal.SIGINT, "watchdog": 1}[forced]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("worker", [None, "unix:/nowhere"])
def test_the_worker_is_started_before_the_gateway_is_imported(worker: str | None) -> None:
    program = f"""
import sys
from millrace.server import start
from millrace.server.config import EngineConfig, ServerConfig, Settings, SupervisorConfig
from millrace.server.errors import StartupError
async def launch(launcher):
    raise StartupError("the gateway is " + ("there" if "millrace.server.app" in sys.modules else "not there"))
start.Launcher.launch = launch
settings = Settings(
    engine=EngineConfig(embedding_model="off"),
    supervisor=SupervisorConfig(worker={worker!r}, worker_start_timeout=0.1),
    server=ServerConfig(port=0, metrics_port=None),
)
sys.exit(start.run(settings))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    expected = "no worker is ready" if worker else "the gateway is not there\n"
    assert (done.returncode, expected in done.stderr) == (1, True), done.stderr


def test_a_repository_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.server.model.hub.download", lambda repository: BUILTIN)
    named = with_model(Settings(engine=EngineConfig(model="acme/tiny")))
    assert (named.engine.checkpoint, named.server.served_model_name) == (BUILTIN, "acme/tiny")
    chosen = ServerConfig(served_model_name="mine")
    assert with_model(Settings(engine=EngineConfig(model="acme/tiny"), server=chosen)).server == chosen
    assert with_model(Settings()) == Settings()


def test_chunks_fit_the_embedding_model() -> None:
    small = EmbedderInfo("small", "r", dimensions=4, max_tokens=128, vocab_size=10)
    assert fitted(RetrievalConfig(), small).chunk_tokens == 128
    assert fitted(RetrievalConfig(), small).chunk_overlap == 32
    assert fitted(RetrievalConfig(chunk_tokens=64), small).chunk_tokens == 64
    with pytest.raises(ConfigError, match=r"--chunk-tokens 512: small reads 128"):
        fitted(RetrievalConfig(chunk_tokens=512), small)

"""Names of models, with a hub cache of our own and no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.server.config import BUILTIN, EngineConfig
from millrace.server.model.hub import locate

SCRIPT = """
import sys
from millrace.server.config import EngineConfig
from millrace.server.errors import CheckpointError
from millrace.server.model.hub import locate
try:
    print(locate(EngineConfig(model=sys.argv[1])).checkpoint)
except CheckpointError as error:
    print(f"refused: {error}")
"""


def located(model: str, home: Path) -> str:
    """What a process without a network makes of a name, on one line."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, model]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_repository_in_the_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    assert located("acme/tiny", tmp_path) == str(snapshot)


def test_a_repository_that_cannot_be_had(tmp_path: Path) -> None:
    answer = located("acme/absent", tmp_path)
    assert answer.startswith("refused: --model acme/absent: no such directory, and no such repository")
    assert len(answer.splitlines()) == 1


@pytest.mark.parametrize("model", ["builtin", str(BUILTIN), "./absent/directory", "absent", "/absent/x", "a/b/c"])
def test_everything_else_is_a_directory(model: str) -> None:
    config = EngineConfig(model=model)
    assert locate(config) is config


def test_a_directory_wins_over_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate(EngineConfig(model="acme/tiny")).checkpoint == Path("acme/tiny")

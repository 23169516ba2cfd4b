"""What the documents tell people to type works."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.server.config import load_settings
from millrace.server.local import local_server

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
DEFAULT_ADDRESS = "127.0.0.1:50051"


def blocks(*languages: str) -> list[pytest.param]:
    return [
        pytest.param(block["language"], block["text"], id=f"{document.name}:{number}")
        for document in DOCUMENTS
        for number, block in enumerate(BLOCK.finditer(document.read_text()))
        if block["language"] in languages and not block["skip"]
    ]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local_server(f"--data-dir={tmp_path_factory.mktemp('data')}") as address:
        yield address


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that looks like a checkout, with `millrace` and `python` as an active environment has them."""
    for name in ("proto", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, words in {"millrace": "-m millrace.server.cli", "python": ""}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (commands / name).chmod(0o755)
    return tmp_path


def run(language: str, text: str, place: Path, address: str) -> str:
    text = text.replace(DEFAULT_ADDRESS, address)
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "MILLRACE_ADDRESS": address}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("language", "text"), blocks("sh", "python"))
def test_block(language: str, text: str, place: Path, address: str) -> None:
    assert run(language, text, place, address).strip(), "it says something"


@pytest.mark.slow
def test_example_of_the_async_client(place: Path, address: str) -> None:
    assert "(24 tokens)" in run("sh", "python examples/ask_many.py", place, address)


@pytest.mark.parametrize(("language", "text"), blocks("toml"))
def test_settings_exist(language: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "millrace.toml"
    file.write_text(text)
    settings = load_settings({}, file, environment={})
    assert len(tomllib.loads(text)) == sum(len(component.model_fields_set) for _, component in settings)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_named_exists(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)`", text)) | set(re.findall(r"^make ([a-z-]+)$", text, re.M)) <= targets
    for link in LINK.findall(text):
        assert (document.parent / link).exists(), link

"""`millrace ask`, and the server that a command on documents starts for itself."""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from served import Served, serving
from structlog.testing import capture_logs
from typer.testing import CliRunner

from millrace.retrieval.types import Document
from millrace.server import cli, local, start
from millrace.server.ask import ask, source_line
from millrace.server.client import Client
from millrace.server.commands import documents
from millrace.server.local import LocalServerFailed, listens, local_server
from millrace.server.worker import parent
from millrace.v1 import generation_pb2 as pb

STUB = """
import os, signal, sys, time
from pathlib import Path
folder, mode, address = sys.argv[1:4]
log = open(f"{folder}/log", "a", buffering=1)
print(os.getpid(), *sys.argv[4:], file=log)
if mode == "fail":
    sys.exit(print("millrace: the data directory is in use", file=sys.stderr) or 1)
if mode == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
def stop(number, frame):
    print("stopped", signal.Signals(number).name, file=log)
    sys.exit(3 if mode == "badly" else 0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "never" else stop)
print("some line")
print(f"Ready: model small at {address}", flush=True)
Path(folder, "ready").touch()
while True:
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    """The server of these tests shares their standard output."""
    with capture_logs():
        yield


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make `local_server` run a stub; returns its log, a line with pid and flags for each start."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)

    def use(mode: str = "", address: str = "grpc://127.0.0.1:5") -> Path:
        monkeypatch.setattr(local, "SERVE", (sys.executable, str(script), str(tmp_path), mode, address))
        return tmp_path / "log"

    return use


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def started(log: Path) -> tuple[int, list[str]]:
    """Process and flags of the stub."""
    pid, *flags = log.read_text().splitlines()[0].split()
    return int(pid), flags


def test_a_local_server(stub: Callable[..., Path]) -> None:
    log, lines = stub(), []
    with local_server("--data-dir=x", say=lines.append) as address:
        pid, flags = started(log)
        assert not is_gone(pid)
    assert address == "127.0.0.1:5"
    assert lines == ["some line", "Ready: model small at grpc://127.0.0.1:5"]
    assert f"--parent-pid={os.getpid()}" in flags
    assert flags[-1] == "--data-dir=x"
    assert {"--host=127.0.0.1", "--port=0", "--metrics-port=0"} < set(flags)
    assert log.read_text().splitlines()[1:] == ["stopped SIGTERM"]
    assert is_gone(pid)


def test_a_local_server_with_tls(stub: Callable[..., Path]) -> None:
    stub(address="grpcs://127.0.0.1:5")
    with local_server() as address:
        assert address == "grpcs://127.0.0.1:5", "a client must see that it is TLS"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_what_happens_in_the_block_is_what_is_raised(stub: Callable[..., Path], error: BaseException) -> None:
    log = stub("badly")
    with pytest.raises(type(error)) as raised, local_server():
        raise error
    assert raised.value is error
    assert log.read_text().splitlines()[1:] == ["stopped SIGTERM"]
    assert is_gone(started(log)[0])


@pytest.mark.parametrize(
    ("mode", "message", "told"),
    [
        ("fail", r"did not start \(status 1\)", True),
        ("crash", r"did not start \(status -9\)", False),
        ("badly", "ended with status 3", False),
        ("never", "did not stop within 0 seconds", False),
    ],
)
def test_a_local_server_that_fails(
    stub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, mode: str, message: str, told: bool
) -> None:
    monkeypatch.setattr(local, "STOP_TIMEOUT", 0.3 if mode == "never" else 30)
    log = stub(mode)
    with pytest.raises(LocalServerFailed, match=message) as raised, local_server():
        pass
    assert raised.value.told is told
    assert is_gone(started(log)[0])


def test_who_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert listens(address)
    assert not listens(address)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        served.library.documents["default", "c"] = {
            "a.md": Document("a.md", b"Parcels may be returned within thirty days.")
        }
        yield served


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """The usual address, where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(documents, "LOCAL", address)
    return address


async def command(*words: str | Path, stdin: str = "") -> Any:
    return await asyncio.to_thread(CliRunner().invoke, cli.app, [str(word) for word in words], input=stdin)


async def test_without_a_server_a_command_starts_one(
    served: Served, stub: Callable[..., Path], nobody: str, tmp_path: Path
) -> None:
    log = stub(address=f"grpc://{served.address}")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "b.md").write_text("text")
    done = await command("ingest", notes, "-c", "c")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("c: 1 created; 1 chunks, 1 embedded")
    assert done.stderr.startswith(f"No server at {nobody}: starting one")
    done = await command("collections")
    assert done.stdout == "c\t2\t2\tfake-embedder\tflat\n"
    assert log.read_text().count("stopped SIGTERM") == 2


async def test_with_a_server_none_is_started(
    served: Served, stub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stub()
    monkeypatch.setattr(documents, "LOCAL", served.address)
    done = await command("collections")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "c\t1\t1\tfake-embedder\tflat\n", "")
    assert (await command("collections", "--address", served.address)).exit_code == 0
    assert not log.exists()


@pytest.mark.parametrize("words", [["collections"], ["ask", "q", "-c", "c"], ["ingest", ".", "-c", "c"]])
def test_an_address_that_is_given_is_the_address(
    words: Sequence[str], stub: Callable[..., Path], nobody: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    log = stub()
    for address, said in ((nobody, f"no server at {nobody}"), ("", "HOST:PORT")):
        monkeypatch.setattr(sys, "argv", ["millrace", *words, "--address", address])
        assert cli.main() == 1
        assert said in capsys.readouterr().err
    assert not log.exists()


@pytest.mark.parametrize("mode", ["fail", "crash"])
def test_a_server_that_does_not_start_is_one_line(
    stub: Callable[..., Path],
    nobody: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    stub(mode)
    monkeypatch.setattr(sys, "argv", ["millrace", "ask", "q", "--collection", "c"])
    assert exit_status() == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[1:] == [
        "millrace: the data directory is in use" if mode == "fail" else "millrace: the server did not start (status -9)"
    ]


def exit_status() -> object:
    try:
        return cli.main()
    except SystemExit as end:
        return end.code


def interrupted(stub_log: Path, nobody: str) -> "subprocess.CompletedProcess[str]":
    """A question whose server is a stub, in a process of its own; while it waits a terminal sends Ctrl-C."""
    program = (
        "import sys\n"
        "from millrace.server import cli, local\n"
        "from millrace.server.commands import documents\n"
        f"documents.LOCAL, local.SERVE = {nobody!r}, {local.SERVE!r}\n"
        "sys.argv = ['millrace', 'ask', 'q', '-c', 'c']\n"
        "sys.exit(cli.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not stub_log.with_name("ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def test_ctrl_c_stops_the_server_too(stub: Callable[..., Path], nobody: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        log = stub(address=f"grpc://127.0.0.1:{silent.getsockname()[1]}")
        done = interrupted(log, nobody)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert log.read_text().splitlines()[1:] == ["stopped SIGTERM"]
    assert is_gone(started(log)[0])


def test_serve_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(parent, "die_with", calls.append)
    monkeypatch.setattr(start, "run", lambda settings: calls.append("run") or 7)
    done = CliRunner().invoke(cli.app, ["serve", "--parent-pid=123"])
    assert (done.exit_code, calls) == (7, [123, "run"])
    assert CliRunner().invoke(cli.app, ["serve"]).exit_code == 7
    assert calls[2:] == ["run"]


async def test_an_answer_with_its_sources(served: Served) -> None:
    done = await command("ask", "When may parcels be returned?", "-c", "c", "--address", served.address,
                         "--mode", "extractive", "--min-support", "0.1")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout == ("Parcels may be returned within thirty days. [1]\n\n[1] a.md, bytes 0-43\n")
    assert done.stderr == ""
    again = await command("ask", "-", "-c", "c", "--address", served.address, "--mode", "extractive",
                          "--min-support", "0.1", stdin="When may parcels be returned?")  # fmt: skip
    assert again.stdout == done.stdout


async def test_a_question_without_support_is_refused(served: Served) -> None:
    done = await command(
        "ask", "Who painted the ceiling?", "-c", "c", "--address", served.address, "--mode", "extractive"
    )
    assert (done.exit_code, done.stdout) == (0, "I don't have enough information to answer that.\n")


class FakeClient:
    """Streams events; keeps what it was asked."""

    def __init__(self, *events: pb.StreamGenerateResponse):
        self.events = events
        self.seen: list[str] = []

    def stream(self, question: str, **options: Any) -> Iterator[pb.StreamGenerateResponse]:
        self.asked = question, options
        for event in self.events:
            yield event
            self.seen.append(sys.stdout.getvalue())  # type: ignore[attr-defined]  # a StringIO here


def text(words: str) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(deltas=pb.Deltas(choices=[pb.ChoiceDelta(text=words)]))


def citation(number: int, start: int, end: int, **fields: Any) -> pb.StreamGenerateResponse:
    one = pb.Citation(source_number=number, source=f"s{number}", byte_start=start, byte_end=end, **fields)
    return pb.StreamGenerateResponse(citation=one)


def test_text_comes_as_it_comes_and_sources_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(
        text("One"),
        citation(2, 5, 9, page=3),
        text(" two"),
        citation(1, 0, 4),
        citation(2, 0, 4, page=3),
        citation(1, 0, 4),
    )
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    ask(client, "q", {"retrieval": {"collection": "c"}, "seed": 5})  # type: ignore[arg-type]  # stands for a client
    assert client.asked == ("q", {"retrieval": {"collection": "c"}, "seed": 5})
    assert client.seen == ["One", "One", "One two", "One two", "One two", "One two"]
    assert out.getvalue() == "One two\n\n[1] s1, bytes 0-4\n[2] s2, page 3, bytes 0-4 and 5-9\n"


def test_a_source_stays_on_its_line_and_leaves_the_terminal_alone() -> None:
    cited = pb.Citation(source_number=1, source="\x1b[31ma\nb\u202e é.txt", byte_start=0, byte_end=4)
    assert source_line(1, [cited]) == r"[1] \x1b[31ma\nb\u202e é.txt, bytes 0-4"


def test_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stream(self: Client, question: str, **options: Any) -> Iterator[pb.StreamGenerateResponse]:
        seen.append((question, options))
        yield from ()

    monkeypatch.setattr(Client, "stream", stream)
    words = "ask q -c c --address unix:/none --mode generative --top-k 3 --max-sentences 2 --min-support 0 --seed 9"
    done = CliRunner().invoke(cli.app, [*words.split(), "--max-tokens", "5", "--temperature", "0"])
    assert done.exit_code == 0, done.output
    retrieval = {"collection": "c", "answer_mode": "generative", "top_k": 3, "max_sentences": 2, "min_support": 0.0}
    assert seen == [("q", {"retrieval": retrieval, "max_output_tokens": 5, "temperature": 0.0, "seed": 9})]
    CliRunner().invoke(cli.app, ["ask", "q", "-c", "c", "--address", "unix:/none"])
    assert seen[1] == ("q", {"retrieval": {"collection": "c"}})
    for wrong in (["--top-k", "0"], ["--max-sentences", "21"], ["--min-support", "2"], ["--mode", "creative"]):
        assert CliRunner().invoke(cli.app, ["ask", "q", "-c", "c", "--address", "unix:/none", *wrong]).exit_code == 2
    assert len(seen) == 2

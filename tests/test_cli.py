"""The command line from outside: exit statuses, one-line errors, a flag for each setting."""

import argparse
import io
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console
from typer.testing import CliRunner

from millrace.kernels import _C
from millrace.server import cli, doctor
from millrace.server.chat import converse
from millrace.server.client import Client, Message, Role
from millrace.server.config import BUILTIN, COMPONENTS, OWNER, EngineConfig, Settings, load_settings
from millrace.server.errors import MillraceError, Overloaded
from millrace.server.gateway.auth import KeyStore
from millrace.server.local import local_server
from millrace.server.worker import main
from millrace.v1 import model_pb2


def millrace(*words: str | bytes, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "millrace.server.cli", *words],
        input=stdin,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"} | environment,  # as most people's locales have it
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=60,
        check=False,
    )


def test_version() -> None:
    assert millrace("--version").stdout.startswith("millrace")


@pytest.mark.parametrize(
    "words",
    [
        ["generate"],
        ["generate", "x", "--seed", "-1"],
        ["generate", "x", "--top-k", "-1"],
        ["generate", "x", "--max-tokens", "99999999999"],
        ["worker", "--listen", "unix:/s", "--grace", "inf"],
        ["worker", "--listen", "unix:/s", "--grace", "nan"],
        ["serve", "--prot", "1"],
        ["serve", "--port", "x"],
        ["bench", "coffee"],
        ["brew"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    done = millrace(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["serve", "--port", "70000"], "port"),
        (["serve", "--kv-cache-memory", "lots"], "kv_cache_memory"),
        (["serve", "--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (["doctor", "--dtype", "float32", "--max-num-seqs", "0"], "max_num_seqs"),
        (["generate", "hello", "--address", "unix:/nonexistent"], "millrace serve"),
        (["generate", "hello", "--ca", "/nonexistent.pem"], "/nonexistent.pem"),
        (["models", "--address", ""], "HOST:PORT"),
        (["models", "--api-key", "mk-1\n"], "API key"),
        (["chat", "--address", "127.0.0.1:1"], "millrace serve"),
        (["models", "--address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["worker", "--listen", "nowhere"], "unix:PATH"),
        (["worker", "--listen", "unix:/s", "--block-size", "0"], "block_size"),
        (["keys", "new", "--tenant", "a b"], "'a b'"),
        (["doctor", "--quantization-group", "64"], "32 or 128"),
    ],
)
def test_failures_are_one_line(words: list[str], named: str) -> None:
    done = millrace(*words)
    assert done.returncode == 1
    assert done.stderr.startswith("millrace: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_bench_lists_and_runs_benchmarks() -> None:
    listed = millrace("bench").stdout
    assert {"engine", "kernels", "quality", "roof", "serving"} <= set(listed.split())
    assert "usage: millrace bench quality" in millrace("bench", "quality", "--help").stdout
    wrong = millrace("bench", "quality", "--windows", "many")
    assert wrong.returncode == 2
    assert "--windows" in wrong.stderr


def test_bytes_that_are_no_text_are_one_line() -> None:
    for done in (
        millrace("generate", b"caf\xe9", "--model", "m"),
        millrace("generate", "-", "--model", "m", stdin="caf\udce9"),
        millrace("generate", "hello", "--model", b"caf\xe9"),
    ):
        assert done.returncode == 1
        assert done.stderr.startswith("millrace: ")
        assert done.stderr.count("\n") == 1
        assert "Unicode" in done.stderr


def test_ctrl_c_while_the_command_line_is_imported() -> None:
    program = (
        "import builtins, os, signal\n"
        "load = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "import millrace.server.__main__\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_unknown_variable_is_an_error() -> None:
    done = millrace("serve", MILLRACE_MAX_NUM_SEQ="5")
    assert done.returncode == 1
    assert "max_num_seq" in done.stderr


def test_every_setting_is_a_flag() -> None:
    for command in ("serve", "doctor"):
        text = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "300"}).stdout
        missing = [name for name in OWNER if f"--{name.replace('_', '-')} " not in text.replace(",", " ")]
        assert not missing


@pytest.mark.parametrize("alone", [True, False])
def test_flags_arrive_as_settings(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag, given the default of its setting or a value of its type, comes out as that setting."""
    seen: list[Settings] = []
    monkeypatch.setattr(doctor, "examine", lambda settings, console: seen.append(settings) or 7)
    words, wanted = [], {}
    for cls in COMPONENTS.values():
        for name, field in cls.model_fields.items():
            if name.startswith("worker_c") or name in ("worker", "worker_key") if alone else cls is EngineConfig:
                continue  # of a worker elsewhere, or only of one here
            flag = f"--{name.replace('_', '-')}"
            default = field.get_default(call_default_factory=True)
            value = default if default is not None else "32"
            wanted[name] = value
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, str(value)]
    result = CliRunner().invoke(cli.app, ["doctor", *words])
    assert result.exit_code == 7, result.output
    assert [s.model_dump() for s in seen] == [load_settings(wanted, environment={}).model_dump()]


def test_worker_takes_the_settings_of_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[argparse.Namespace, EngineConfig]] = []

    def run_worker(words: list[str]) -> None:
        arguments = main.parse_arguments(words)
        seen.append((arguments, main.read_engine_config(arguments.engine_config)))

    monkeypatch.setattr(main, "main", run_worker)
    file = tmp_path / "engine.toml"
    file.write_text("max-num-seqs = 3")
    words = ["--listen", "unix:/s", "--kv-cache-memory", "2GiB", "--config", str(file), "--tls-ca", "ca.pem"]
    result = CliRunner().invoke(cli.app, ["worker", *words, "--grace", "2.5"])
    assert result.exit_code == 0, result.output
    [(arguments, engine)] = seen
    assert engine == EngineConfig(kv_cache_memory=2 << 30, max_num_seqs=3)
    assert (arguments.listen, arguments.grace, arguments.tls_ca) == ("unix:/s", 2.5, Path("ca.pem"))


def test_keys(tmp_path: Path) -> None:
    done = millrace("keys", "new", "--tenant", "search")
    key = done.stderr.split()[-1]
    assert key not in done.stdout
    file = tmp_path / "keys.toml"
    file.write_text(done.stdout + millrace("keys", "new", "--tenant", "other").stdout)
    assert KeyStore.load(file).authenticate(f"Bearer {key}").tenant == "search"


def test_doctor_prints_every_setting_and_bound() -> None:
    console = Console(file=io.StringIO(), width=200)
    status = doctor.examine(load_settings({"port": 0}, environment={}), console)
    text = console.file.getvalue()
    assert status == int("FAIL" in text)
    assert not [name for name in OWNER if name not in text]
    for field in ("SamplingParams.top_p", "UpsertDocumentsRequest.content_part", "EmbedRequest.inputs"):
        assert field in text
    assert "more than 0, at most 1" in text
    assert "max-model-len 1024" in text or "model.safetensors" in text
    assert f"with {_C.isa()} of baseline, " in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "executor cpu, dtype bf16"),
        ({"quantization": "int8"}, "executor cpu, dtype int8"),
        ({"quantization": "int4"}, "executor cpu, dtype int4-g128, head int8"),
        ({"quantization": "int4", "quantization_group": 32, "kv_cache_dtype": "int8"}, "int4-g32, head int8, kv int8"),
        ({"executor": "reference"}, "executor reference, dtype float32"),
    ],
)
def test_doctor_names_executor_and_precision(flags: dict[str, Any], words: str) -> None:
    finding = doctor.check("model", doctor.CHECKS["model"], load_settings(flags, environment={}))
    assert finding.good
    assert words in finding.text


@pytest.mark.parametrize("name", ["native extension", "model"])
def test_doctor_knows_no_other_instruction_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_ISA", "neon")
    finding = doctor.check(name, doctor.CHECKS[name], load_settings({}, environment={}))
    assert not finding.good
    assert "MILLRACE_ISA=neon: this machine has baseline, " in finding.text


@pytest.mark.parametrize(("flag", "value"), [("model", "/nonexistent"), ("host", "0.0.0.0"), ("api_keys", "/none")])
def test_doctor_fails_where_serving_would(flag: str, value: str) -> None:
    settings = load_settings({"port": 0, "metrics_port": 0, flag: value}, environment={})
    assert doctor.examine(settings, Console(file=io.StringIO())) == 1


def verdict(**flags: object) -> list[str]:
    """What `doctor` finds wrong."""
    settings = load_settings({"port": 0, "metrics_port": 0} | flags, environment={})
    findings = [doctor.check(name, work, settings) for name, work in doctor.CHECKS.items()]
    return [finding.text for finding in findings if not finding.good]


def test_doctor_tries_both_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag in ("port", "metrics-port"):
            [wrong] = verdict(**{flag.replace("-", "_"): port})
            assert f"--{flag}" in wrong
    [wrong] = verdict(port=port, metrics_port=port)
    assert "in use" in wrong
    assert verdict(port=port) == []  # and it has let go of it


def test_doctor_loads_certificates_with_their_keys(tmp_path: Path) -> None:
    (cert, key), (_, other) = certificate(tmp_path / "a"), certificate(tmp_path / "b")
    assert verdict(tls_cert=cert, tls_key=key) == []
    assert "a pair?" in verdict(tls_cert=cert, tls_key=other)[0]
    worker = {"worker": "127.0.0.1:5", "worker_ca": cert, "worker_cert": cert}
    assert verdict(**worker, worker_key=key) == []
    assert "a pair?" in verdict(**worker, worker_key=other)[0]
    assert "No such file" in verdict(**worker, worker_key=tmp_path / "none")[0]


def certificate(stem: Path) -> tuple[Path, Path]:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(hours=1))
    files = stem.with_suffix(".pem"), stem.with_suffix(".key")
    files[0].write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return files


def test_doctor_wants_no_weights_where_the_worker_has_them(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUILTIN, model, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__pycache__"))
    assert "safetensors" in verdict(model=str(model))[0]
    assert verdict(model=str(model), worker="unix:/socket") == []


@pytest.mark.parametrize("terminal", [True, False])
def test_models_are_shown_whole(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-name-of-thirty-four-characters-8"
    limits = model_pb2.ModelLimits(max_context_tokens=131072)
    model = model_pb2.Model(
        name=name,
        state=model_pb2.MODEL_STATE_READY,
        architecture="Qwen3ForCausalLM",
        backend="reference",
        limits=limits,
    )
    monkeypatch.setattr(Client, "models", lambda client: [model, model])
    monkeypatch.setattr(cli.sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(out, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    cli.models("unix:/nowhere")
    row = [name, "ready", "131072", "Qwen3ForCausalLM", "reference"]
    lines = out.getvalue().splitlines()
    if terminal:
        assert max(map(len, lines)) <= 80
        assert [line.split() for line in lines] == [["name", "state", "context", "architecture", "backend"], row, row]
    else:
        assert lines == ["\t".join(row)] * 2


def test_a_bad_byte_does_not_end_a_conversation(tmp_path: Path) -> None:
    with local_server(f"--data-dir={tmp_path}") as address:
        done = millrace("chat", "--address", address, "--max-tokens", "1", stdin="caf\udce9\nhello\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("millrace: prompt: ") == 1
    assert done.stdout.count("> ") == 3


class FakeClient:
    """Echoes; `fail` raises at that question, `interrupt` is Ctrl-C after its first word."""

    class connection:  # noqa: N801  # stands for an attribute
        target = "here"

    def models(self):
        return []

    def stream_text(self, history, **options):
        question = history[-1].content
        if question == "fail":
            raise Overloaded("too many")
        self.history = list(history)
        yield "you said "
        if question == "interrupt":
            raise KeyboardInterrupt
        yield question


def test_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["one", "", "fail", "interrupt", "two"])

    def ask(self, prompt: str = "", **options: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Console, "input", ask)
    client = FakeClient()
    converse(client, "be brief", {})
    assert client.history == [
        Message(Role.SYSTEM, "be brief"),
        Message(Role.USER, "one"),
        Message(Role.ASSISTANT, "you said one"),
        Message(Role.USER, "interrupt"),
        Message(Role.ASSISTANT, "you said "),
        Message(Role.USER, "two"),
    ]
    assert "too many" in capsys.readouterr().out


def test_errors_print_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise MillraceError("two\nlines")

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main() == 1
    assert capsys.readouterr().err == "millrace: two lines\n"


def test_nobody_reads_the_output() -> None:
    command = [sys.executable, "-m", "millrace.server.cli", "serve", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    with process.stderr as stderr:
        assert "Traceback" not in stderr.read()
    assert process.wait(30) in (0, 1)

"""The benchmark of the engine runs from end to end, and its figures land where they belong."""

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from millrace.bench.comparison import OURS, Comparison, Result, reused_peers
from millrace.bench.peers.base import PeerError, call
from millrace.bench.peers.llama_cpp import ATTEMPTS, LlamaCpp, has_avx512
from millrace.bench.roof import Rate, Roof
from millrace.bench.workload import Speeds, Workload

SOME = Rate("DRAM read", "", 1e9, 2e9)
WORK = Workload(batches=(1, 8))


def comparison(*results: Result) -> Comparison:
    return Comparison(
        label="tiny",
        threads=2,
        isa="avx2",
        workload=WORK,
        roof=Roof(2, SOME, SOME, ()),
        dram={"int8": {1: 2e9, 8: 3e9}},
        limits={"int8": Speeds(1000.0, {1: 20.0, 8: 160.0}, 200.0)},
        versions={"vllm": "vLLM 1"},
        results=results,
    )


def rows(found: Comparison) -> dict[str, list[str]]:
    console = Console(width=160, record=True, file=StringIO())
    for table in found.tables():
        console.print(table)
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_ratios_are_of_the_limit_and_of_the_best_peer() -> None:
    found = rows(
        comparison(
            Result(OURS, "int8", Speeds(500.0, {1: 18.0, 8: 120.0}, 150.0)),
            Result("vllm", "int8", Speeds(250.0, {1: 6.0, 8: 60.0}, None)),
            Result("openvino", "int8", Speeds(100.0, {1: 9.0, 8: 30.0}, 50.0)),
            Result("llama-cpp", "int8", error="it broke"),
            Result("vllm", "bf16", Speeds(9999.0, {1: 999.0}, 999.0)),
        )
    )
    assert found["prefill 512"] == ["50%", "2.00x", "500", "250", "100", "1,000"]
    assert found["decode, batch 1"] == ["90%", "2.00x", "18.0", "6.0", "9.0", "20.0"]
    assert found["decode, batch 8"] == ["75%", "2.00x", "120", "60.0", "30.0", "160"]
    assert found["32 x (256 + 64), output"] == ["75%", "3.00x", "150", "-", "50.0", "200"]


def test_what_was_not_measured_is_said() -> None:
    found = comparison(Result(OURS, "int8", error="no room"), Result("vllm", "int8", Speeds(250.0, {}, None)))
    assert list(found.errors()) == ["millrace int8: no room"]
    assert rows(found)["prefill 512"] == ["-", "-", "-", "250", "1,000"]


def test_peers_of_an_earlier_run_are_marked(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    peer = Result("vllm", "int8", Speeds(250.0, {1: 6.0}, None))
    file.write_text(json.dumps(comparison(peer, Result(OURS, "int8", Speeds(1.0, {}, None))).to_json()))
    ours = Result(OURS, "int8", Speeds(500.0, {1: 18.0}, 150.0))
    found = reused_peers(comparison(ours), file)
    assert list(found.results) == [ours, replace(peer, reused=True)]
    assert next(iter(found.tables())).columns[4].header == "vllm (reused)"


def test_peers_of_other_work_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps(replace(comparison(), threads=8).to_json()))
    with pytest.raises(ValueError, match="threads was 8, now it is 2"):
        reused_peers(comparison(), file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no result of this bench"):
        reused_peers(comparison(), file)


def test_a_command_that_fails_tells_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="ended with 3: the reason"):
        call(["sh", "-c", "echo first >&2; echo the reason >&2; exit 3"], tmp_path)
    with pytest.raises(PeerError, match="No such file"):
        call([str(tmp_path / "missing")], tmp_path)


def test_speeds_of_llama_cpp_are_read_from_its_own_bench(tmp_path: Path) -> None:
    build = "avx512" if has_avx512() else "avx2"
    program = tmp_path / "llama-cpp" / build / "bin" / "llama-batched-bench"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "print('main: something else')\n"
        "for batch in options['-npl'].split(','):\n"
        "    n = int(batch)\n"
        "    print(json.dumps({'pl': n, 'speed_pp': 70 + n, 'speed_tg': 10 * n, 't': 16.0}))\n"
    )
    program.chmod(0o755)
    speeds = LlamaCpp().run(tmp_path / "m.gguf", "int8", 2, "avx512", WORK, tmp_path)
    assert speeds == Speeds(71.0, {1: 10.0, 8: 80.0}, 32 * 64 / 16.0)


def test_a_silent_llama_cpp_is_asked_again_but_not_for_ever(tmp_path: Path) -> None:
    program = tmp_path / "llama-cpp" / "avx2" / "bin" / "llama-batched-bench"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho >> asked\n")
    program.chmod(0o755)
    with pytest.raises(PeerError, match="printed no results"):
        LlamaCpp().run(tmp_path / "m.gguf", "int8", 2, "avx2", WORK, tmp_path)
    assert len((tmp_path / "asked").read_text().splitlines()) == ATTEMPTS


def test_a_quick_run_of_ours_prints_tables_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "millrace.bench.engine", "--model", "tiny", "--quick", "--only", "ours"]
    command += ["--widths", "float32,int8", "--work-dir", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    for words in ("The roof of this machine", "tiny, float32", "of limit", "decode, batch 4", "4 x (32 + 8), output"):
        assert words in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert [result["width"] for result in written["results"]] == ["float32", "int8"]
    for result in written["results"]:
        assert (result["engine"], result["error"]) == ("millrace", None)
        found, limit = result["speeds"], written["limits"][result["width"]]
        assert found["decode"].keys() == limit["decode"].keys() == {"1", "4"}
        assert min(found["prefill"], found["mixed"], *found["decode"].values()) > 0

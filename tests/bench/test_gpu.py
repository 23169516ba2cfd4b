"""The checks of GPU kernels, as far as a machine without one can run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from millrace.bench import gpu
from millrace.bench.gpu_cases import Case

ROOT = Path(__file__).parents[2]


def test_the_script_runs_dry_where_there_is_no_gpu(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", "bench/gpu_check.sh", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing is measured" in result.stdout
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["roofs"] is None
    assert {line["name"].split()[0] for line in told["lines"]} == {
        "int4", "fp8", "int8", "attention", "rms_norm", "silu", "rotate"
    }  # fmt: skip
    assert all(0 < line["error"] < 1e-2 and line["seconds"] == 0 for line in told["lines"])


@pytest.mark.parametrize("found", [torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])])
def test_a_wrong_result_is_told_and_the_others_go_on(
    found: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Case("wrong", lambda: found, lambda: torch.tensor([1.0, 3.0]).double(), bytes=1)
    right = Case("right", lambda: torch.ones(2), lambda: torch.ones(2).double(), bytes=1)
    monkeypatch.setattr(gpu, "CASES", (lambda device, small: iter([wrong, right]),))
    monkeypatch.setattr("sys.argv", ["gpu", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    assert lines[0].startswith("wrong: FAILED")
    assert "not measured" in lines[1]


def test_without_a_gpu_it_says_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert "--dry-run" in capsys.readouterr().err

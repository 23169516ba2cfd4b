"""The production kernels compile for Hopper within its shared memory, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "triton_compile.py"
SHARED = 227 << 10  # bytes of a multiprocessor that one program may have


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("part", "least"), [("rows", 21), ("cache", 15), ("attention", 49), ("matmul", 31)])
def test_kernels_compile_for_hopper(part: str, least: int) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), part],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    needs = json.loads(result.stdout)
    assert len(needs) >= least
    assert {name: one for name, one in needs.items() if not one["cubin"] or one["shared"] > SHARED} == {}
    if part == "matmul":
        large = [name for name in needs if name.split()[2:3] == [str(1 << 30)]]
        assert large
        assert all(needs[name]["wgmma"] for name in large), "Hopper's own instruction for products"

"""The production kernels compile for Hopper within its shared memory, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "triton_compile.py"
SHARED = 227 << 10  # bytes of a multiprocessor that one program may have
PARTS = {"rows": 9, "cache": 7, "attention": 22, "matmul": 13}  # and how many kernels each has


@pytest.mark.timeout(600)
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    running = {
        part: subprocess.Popen(
            [sys.executable, str(SCRIPT), part],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in PARTS
    }
    for part, process in running.items():
        out, error = process.communicate()
        assert process.returncode == 0, f"{part}: {error[-2000:]}"
        needs = json.loads(out)
        assert len(needs) == PARTS[part]
        assert {name: one for name, one in needs.items() if not one["cubin"] or one["shared"] > SHARED} == {}
        if part == "matmul":
            large = [name for name in needs if name.split()[2:3] == [str(1 << 30)]]
            assert len(large) == 4
            assert all(needs[name]["wgmma"] for name in large), "Hopper's own instruction for products"

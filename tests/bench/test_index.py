"""The benchmark of the vector index prints what it says it prints."""

import subprocess
import sys


def test_the_quick_look_prints_its_tables() -> None:
    command = [sys.executable, "-m", "millrace.bench.index", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stderr == ""
    for words in ("flat/hnsw", "recall@10", "3,000", "50.0% allowed", "30% deleted"):
        assert words in done.stdout

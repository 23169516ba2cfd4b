"""The benchmark of the guard reads its labels, and prints its tables."""

import subprocess
import sys

from millrace.bench.guardrails import parse


def test_labels() -> None:
    text, spans = parse(r"To ⟦email:a\u200b@b.example⟧, ⟦ssn:123-45-6789⟧.")
    assert text == "To a\u200b@b.example, 123-45-6789."
    assert spans == [("email", 3, 15), ("ssn", 17, 28)]


def test_the_quick_look_prints_its_tables() -> None:
    command = [sys.executable, "-m", "millrace.bench.guardrails", "--mib", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stderr == ""
    for title in ("MB/s on one core", "precision"):
        assert title in done.stdout

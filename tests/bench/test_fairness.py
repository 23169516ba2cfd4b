"""The bench of fairness: a whole server with two tenants."""

import pytest

from millrace.bench import fairness
from millrace.server.config import BUILTIN


def test_both_parts_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fairness, "FLOOD", 5)
    monkeypatch.setattr(fairness, "LONG", 200)
    monkeypatch.setattr("sys.argv", ["fairness", "--model", str(BUILTIN), "--seconds", "2", "--quantization", "none"])
    fairness.main()
    lines = capsys.readouterr().out.splitlines()
    alone, beside = (line.split() for line in lines[2:4])
    assert all(float(number) > 0 for number in alone[-2:] + beside[-2:])
    assert "5 of A's requests ended" in lines[-1]


def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fairness", "--model", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        fairness.main()
    assert ended.value.code == 1

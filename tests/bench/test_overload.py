"""The bench of overload: a whole server, asked for more than it can do."""

import pytest

from millrace.bench import overload
from millrace.bench.overload import Answer, Outcome, report
from millrace.server.config import BUILTIN


def test_every_load_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(overload, "PROMPT", (10, 60))
    monkeypatch.setattr(overload, "OUTPUT", (5, 40))
    monkeypatch.setattr(overload, "LOADS", (3, 10))
    monkeypatch.setattr("sys.argv", ["overload", "--model", str(BUILTIN), "--seconds", "2", "--quantization", "none"])
    overload.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.rsplit(None, 5) for line in lines[3:6]]
    assert [row[0] for row in rows] == ["3x, first come first served", "3x", "10x"]
    assert all(int(row[1]) > 0 and float(row[2]) >= 0 for row in rows)
    assert int(rows[2][1]) > 2 * int(rows[1][1]), "ten times is more than three times"
    assert int(rows[2][3]) > 0, "somebody is refused"


def test_the_report_counts_everybody_once(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [Answer(1, True), Answer(2, True), Answer(0.01, False, refused=True), Answer(5, False)]
    few = [Answer(1, True), *answers[2:]]
    report(2.0, 1.0, [Outcome(3, False, 1, few), *(Outcome(load, True, 1, answers) for load in (1, 3, 10))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["1x", "4", "2.00", "1", "10", "1"]
    assert "served: 2.00 " in lines[-3]
    assert "load: 1.00 " in lines[-2]
    assert "10 ms" in lines[-1]


def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["overload", "--model", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        overload.main()
    assert ended.value.code == 1

"""What a step costs beside the model: how it grows."""

import pytest

from millrace.bench import scheduler


def least(running: int, waiting: int) -> float:
    """Microseconds, of the quietest of three attempts."""
    return min(scheduler.step_us(running, waiting, 100) for _ in range(3))


def test_a_step_grows_with_what_runs_and_not_with_what_waits() -> None:
    few, many = least(32, 0), least(256, 0)
    assert many < 1.2 * 256 / 32 * few
    assert least(256, 5000) < 1.5 * many


def test_the_plot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scheduler", "--running", "4", "8", "--waiting", "0", "3", "--steps", "20"]
    monkeypatch.setattr("sys.argv", arguments)
    scheduler.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["4", "0"], ["4", "3"], ["8", "0"], ["8", "3"]]
    assert all(float(row[2]) > 0 for row in rows)

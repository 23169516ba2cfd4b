"""The bench of the thread pool: each cost is measured, and wrong arguments are told."""

import pytest

from millrace.bench.threads import main
from millrace.kernels import _C


@pytest.mark.parametrize("what", ["barrier", "run", "share", "idle"])
def test_every_cost_is_a_time(what: str) -> None:
    assert 0 < _C.pool_cost(what=what, threads=2, rounds=100) < 1e9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"what": "nap"}, "what must be one of barrier, run, share, idle, not nap"),
        ({"threads": 0}, "threads must be 1 to 1024"),
        ({"rounds": 99}, "at least 100 rounds"),
        ({"what": "idle", "threads": 1}, "at least two threads"),
    ],
)
def test_wrong_arguments(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.pool_cost(**{"what": "barrier", "threads": 2, "rounds": 100} | wrong)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["threads", "--threads", "3", "--rounds", "100"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["2", "3"]
    monkeypatch.setattr("sys.argv", ["threads", "--threads", "1"])
    with pytest.raises(SystemExit):
        main()

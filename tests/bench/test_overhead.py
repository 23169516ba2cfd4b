"""The bench of a step's overhead: what it prints adds up, and is about steps in which every sequence decodes."""

import pytest

from millrace.bench.overhead import main, measure


def test_the_parts_of_a_step() -> None:
    whole, native, beside = measure("builtin", 3, 24)
    assert 0 < native < whole
    assert 0 < beside < whole


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["overhead", "--steps", "12"])
    main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["1", "8", "32"]


@pytest.mark.parametrize("wrong", [["--steps", "9"], ["--model", "nowhere"]])
def test_wrong_arguments(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["overhead", *wrong])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (1, 2)

"""The bench of prefixes: what it prints is about requests of which only the second finds anything."""

import pytest

from millrace.bench import prefix
from millrace.server.config import BUILTIN


def test_the_second_request_is_sooner_and_a_conversation_computes_what_is_new(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefix, "COMMON", 256)
    monkeypatch.setattr(prefix, "TURNS", 3)
    monkeypatch.setattr("sys.argv", ["prefix", "--model", str(BUILTIN), "--rounds", "1"])
    prefix.main()
    lines = capsys.readouterr().out.splitlines()
    assert "x sooner" in lines[1]
    computed = [int(word.strip("[],")) for word in lines[2].partition("computed ")[2].split()]
    assert computed[0] == prefix.SAID
    assert all(prefix.SAID < count <= prefix.SAID + 1 + 32 for count in computed[1:])


def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prefix", "--model", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        prefix.main()
    assert ended.value.code == 1

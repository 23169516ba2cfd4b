"""The bench of probing: it can tell where there is something to tell, and not across tenants."""

import re

import pytest

from millrace.bench import probe


def test_a_tenant_knows_its_own_prompts_and_not_those_of_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["probe", "--pairs", "60"])
    probe.main()
    own, other = map(float, re.findall(r"(?:prompts|tenant's) (\d\.\d+)", capsys.readouterr().out))
    assert own > 0.9
    assert abs(other - 0.5) < 0.2, "four standard errors of chance"


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert probe.auc([(1, 3), (2, 4)]) == 1
    assert probe.auc([(3, 1), (4, 2)]) == 0
    assert probe.auc([(1, 1), (2, 2)]) == 0.5


def test_too_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["probe", "--pairs", "3"])
    with pytest.raises(SystemExit):
        probe.main()

"""Exactly the labelled spans are masked, no more and no less."""

from collections import Counter
from pathlib import Path

import pytest

from millrace.bench.guardrails import labelled
from millrace.server.gateway.guardrails.pii import MASKS, PIIGuard

LINES = labelled(Path(__file__).parent / "labelled.txt")


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text[:40])
def test_spans(line):
    found = PIIGuard().inspect(line.text)
    assert [(finding.category, finding.start, finding.end) for finding in found] == line.spans


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text[:40])
def test_masks(line):
    expected, position = "", 0
    for category, start, end in line.spans:
        expected, position = expected + line.text[position:start] + MASKS[category], end
    assert PIIGuard().mask(line.text) == expected + line.text[position:]


def test_the_set_is_large():
    counted = Counter(category for line in LINES for category, _, _ in line.spans)
    assert min(counted[category] for category in MASKS) >= 20
    assert sum(not line.spans for line in LINES) >= 80

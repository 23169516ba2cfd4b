"""What widths cost, and the arithmetic that says so. The bounds are those the cpu executor promises."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from millrace.bench.quality import Sums, log_softmax, measure, windows
from millrace.server.config import BUILTIN
from millrace.server.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
HELD_OUT = ROOT.parent / "shared/data/corpus/valid.jsonl.xz"
# Perplexity over float32's, at most; on texts that the model was not made for, int4 costs a little more.
BOUNDS = {"bf16": 1.001, "bf16-kv-int8": 1.001, "int8": 1.005, "int4-g128": 1.03, "int4-g32": 1.03}


def text() -> str:
    """Held out from the training of the built-in model where it is there, else the pages of the example shop."""
    if not HELD_OUT.is_file():
        return "\n\n".join(path.read_text() for path in sorted((ROOT / "examples/docs").glob("*.md")))
    with lzma.open(HELD_OUT, "rt") as lines:
        return "\n\n".join(json.loads(line)["text"] for line, _ in zip(lines, range(20), strict=False))


def test_each_width_keeps_the_perplexity_of_the_built_in_model() -> None:
    cut = windows(Tokenizer.load(BUILTIN).encode(text()), 256, 16)
    exact, *found = measure("builtin", cut, list(BOUNDS))
    assert exact.divergence == 0
    assert exact.agreement == 1
    for quality in found:
        assert quality.perplexity < exact.perplexity * BOUNDS[quality.width], quality
        assert 0 < quality.divergence < 0.05
    kl = {quality.width: quality.divergence for quality in found}
    assert kl["bf16"] < kl["bf16-kv-int8"] < kl["int8"] < kl["int4-g32"] < kl["int4-g128"]


def test_sums_against_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    window = np.array([1, 4, 2, 0], np.int32)
    found, wanted = (rng.standard_normal((4, 5)).astype(np.float32) * 3 for _ in range(2))
    sums = Sums()
    sums.add(window, found, wanted)
    quality = sums.quality("any")
    p, q = (np.exp(x[:3].astype(float)) / np.exp(x[:3].astype(float)).sum(1, keepdims=True) for x in (wanted, found))
    likelihood = q[0, 4] * q[1, 2] * q[2, 0]
    assert quality.perplexity == pytest.approx(likelihood ** (-1 / 3))
    assert quality.divergence == pytest.approx((p * np.log(p / q)).sum() / 3)
    assert quality.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())


def test_log_softmax_of_large_logits() -> None:
    assert log_softmax(np.array([[1e4, 1e4]], np.float32)) == pytest.approx(np.log([[0.5, 0.5]]))


def test_windows() -> None:
    assert [window.tolist() for window in windows([1, 2, 3, 4, 5], 2, 9)] == [[1, 2], [3, 4]]
    assert [window.tolist() for window in windows([1, 2, 3, 4, 5], 3, 1)] == [[1, 2, 3]]
    with pytest.raises(ValueError, match="fewer than two tokens"):
        windows([1], 4, 9)

"""What widths cost, and the arithmetic that says so. The bounds are those the cpu executor promises."""

import json
import lzma
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from millrace.bench import quality
from millrace.bench.peers.base import PeerError
from millrace.bench.peers.registry import PEERS
from millrace.bench.perplexity import Quality, Sums, measure, measure_peer, peer_width, windows
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
    for of in found:
        assert of.perplexity < exact.perplexity * BOUNDS[of.width], of
        assert 0 < of.divergence < 0.05
    kl = {of.width: of.divergence for of in found}
    assert kl["bf16"] < kl["bf16-kv-int8"] < kl["int8"] < kl["int4-g32"] < kl["int4-g128"]


def test_sums_against_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    window = np.array([1, 4, 2, 0], np.int32)
    found, wanted = (rng.standard_normal((4, 5)).astype(np.float32) * 3 for _ in range(2))
    sums = Sums()
    sums.add(window, found, wanted)
    came = sums.quality("any")
    p, q = (np.exp(x[:3].astype(float)) / np.exp(x[:3].astype(float)).sum(1, keepdims=True) for x in (wanted, found))
    likelihood = q[0, 4] * q[1, 2] * q[2, 0]
    assert came.perplexity == pytest.approx(likelihood ** (-1 / 3))
    assert came.divergence == pytest.approx((p * np.log(p / q)).sum() / 3)
    assert came.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())


def test_a_ratio_has_the_error_of_its_differences() -> None:
    """Against what many draws of as many windows come to; what windows share does not count."""
    rng = np.random.default_rng(0)
    texts = rng.normal(900, 100, (4000, 50))
    ratios, errors = [], []
    for text, more in zip(texts, rng.normal(1, 2, (4000, 50)), strict=True):
        ratio, error = Quality("a", text + more, 10_000).over(Quality("b", text, 10_000))
        ratios.append(ratio)
        errors.append(error)
    assert np.mean(ratios) == pytest.approx(np.exp(50 / 10_000), rel=1e-4)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)
    assert np.isnan(Quality("a", texts[0, :1], 9).over(Quality("b", texts[1, :1], 9))[1])


def test_windows() -> None:
    assert [window.tolist() for window in windows([1, 2, 3, 4, 5], 2, 9)] == [[1, 2], [3, 4]]
    assert [window.tolist() for window in windows([1, 2, 3, 4, 5], 3, 1)] == [[1, 2, 3]]
    with pytest.raises(ValueError, match="fewer than two tokens"):
        windows([1], 4, 9)


class FakePeer:
    """As likely as any of so many tokens, each of them; or the reason why not."""

    def __init__(self, name: str, tokens: float | str, int4_group: int = 128, widths: Sequence[str] = ("bf16", "int4")):
        self.name, self.tokens, self.int4_group, self.widths = name, tokens, int4_group, widths
        self.asked: list[str] = []

    def convert(self, checkpoint: Path, label: str, width: str, work: Path) -> Path:
        self.asked.append(width)
        return work / label

    def losses(self, model: Path, width: str, threads: int, windows: list[list[int]], work: Path) -> list[float]:
        if isinstance(self.tokens, str):
            raise PeerError(self.tokens)
        return [float(np.log(self.tokens)) * (len(window) - 1) for window in windows]


CUT = [np.arange(9, dtype=np.int32), np.arange(9, dtype=np.int32)]


def even(width: str, perplexity: float, divergence: float, agreement: float) -> Quality:
    losses = np.array([np.log(perplexity) * (len(window) - 1) for window in CUT])
    return Quality(width, losses, sum(len(window) - 1 for window in CUT), divergence, agreement)


def test_a_peer_whose_tokens_are_equally_likely(tmp_path: Path) -> None:
    found = measure_peer(FakePeer("even", 7.0), "int4-g128", BUILTIN, CUT, tmp_path)
    assert (found.width, found.engine) == ("int4-g128", "even")
    assert (found.divergence, found.agreement) == (None, None)
    assert found.perplexity == pytest.approx(7)


def test_peers_are_compared_at_their_width_and_group() -> None:
    of = {name: [peer_width(peer, width) for width in quality.WIDTHS] for name, peer in PEERS.items()}
    assert list(quality.WIDTHS) == ["bf16", "bf16-kv-int8", "int8", "int4-g128", "int4-g32"]
    assert of == {
        "openvino": ["bf16", None, "int8", "int4", None],
        "llama-cpp": ["bf16", None, "int8", None, "int4"],
        "vllm": ["bf16", None, None, None, None],
    }


def test_the_table_sets_ours_beside_the_best_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {"a": FakePeer("a", 50.0), "b": FakePeer("b", 40.0, 32), "c": FakePeer("c", "no room", 32)}
    monkeypatch.setattr(quality, "PEERS", fakes)
    ours = [even("float32", 40.0, 0.0, 1.0), even("bf16", 44.0, 1e-5, 0.9), even("bf16-kv-int8", 45.0, 0, 1)]
    ours += [even("int4-g128", 60.0, 1e-2, 0.5), even("int4-g32", 30.0, 1e-2, 0.5)]
    monkeypatch.setattr(quality, "measure", lambda model, cut, widths: iter(ours))
    options = Namespace(model="builtin", widths=["any"], work_dir=tmp_path)
    lines = [line.split() for line in quality.compare(options, BUILTIN, CUT, list(fakes))]
    assert lines[0] == ["width", "engine", "perplexity", "ratio", "error", "KL", "top-1"]
    assert lines[1:9] == [
        ["float32", "millrace", "40.000", "1.0000", "0.0000", "0.00e+00", "1.000"],
        ["bf16", "millrace", "44.000", "1.1000", "0.0000", "1.00e-05", "0.900"],
        ["bf16", "a", "50.000", "1.2500", "0.0000", "-", "-"],
        ["bf16", "b", "40.000", "1.0000", "0.0000", "-", "-"],
        ["bf16-kv-int8", "millrace", "45.000", "1.1250", "0.0000", "0.00e+00", "1.000"],
        ["int4-g128", "millrace", "60.000", "1.5000", "0.0000", "1.00e-02", "0.500"],
        ["int4-g128", "a", "50.000", "1.2500", "0.0000", "-", "-"],
        ["int4-g32", "millrace", "30.000", "0.7500", "0.0000", "1.00e-02", "0.500"],
    ]
    assert [" ".join(words) for words in lines[10:]] == [
        "bf16: our perplexity is 1.1000 of the best peer's (b), error 0.0000",
        "int4-g128: our perplexity is 1.2000 of the best peer's (a), error 0.0000",
        "int4-g32: our perplexity is 0.7500 of the best peer's (b), error 0.0000",
        "not measured: c bf16: no room",
        "not measured: c int4-g32: no room",
    ]
    assert fakes["a"].asked == ["bf16", "int4"]


def run(module: str, *words: str, without: Sequence[str] = ()) -> SimpleNamespace:
    lines = ["import runpy, sys", f"sys.modules.update(dict.fromkeys({list(without)!r}))", f"sys.argv[1:] = {words!r}"]
    code = "\n".join([*lines, f"runpy.run_module({module!r}, run_name='__main__')"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    return SimpleNamespace(status=done.returncode, out=done.stdout, error=done.stderr)


@pytest.mark.parametrize(("name", "words"), [("quality", ["--only", "ours"]), ("kernels", ["rows"])])
def test_without_pytorch_there_is_one_line(name: str, words: list[str]) -> None:
    done = run(f"millrace.bench.{name}", *words, without=["torch"])
    assert done.status == 1
    assert done.error.startswith(f"{name}: ")
    assert done.error.endswith("needs PyTorch: pip install torch==2.13.0\n")
    assert done.error.count("\n") == 1


def test_ours_alone_from_the_command_line(tmp_path: Path) -> None:
    words = ["--only", "ours", "--windows", "1", "--window", "9", "--widths", "int8", "--work-dir", str(tmp_path)]
    done = run("millrace.bench.quality", *words)
    assert (done.status, done.error) == (0, "")
    assert [line.split()[:2] for line in done.out.splitlines()[2:]] == [["float32", "millrace"], ["int8", "millrace"]]


def test_a_peer_that_there_is_not_is_named() -> None:
    done = run("millrace.bench.quality", "--peers", "openvino,other")
    assert done.status == 2
    assert "there is no 'other'; there are openvino, vllm, llama-cpp" in done.error

"""The way to a peer's environment and back, what runners make of logits, and which peers run. No peer is installed."""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from millrace.bench.likelihood import log_softmax, loss
from millrace.bench.peers import choice, llama_cpp, openvino, vllm_cpu
from millrace.bench.peers.base import Peer, PeerError
from millrace.bench.peers.choice import chosen
from millrace.bench.workload import Workload

RUNNER = '''
"""A peer of four tokens, whose model file says what it does wrong."""
import os
from millrace.bench.peers.runner import serve, timed

class Steps:
    def __init__(self, model, threads, workload):
        assert workload.batches == (1,)
        self.left = {}
    def add(self, request, prompt, output_tokens):
        self.left[request] = output_tokens
    def step(self):
        found = list(self.left)
        self.left = {request: left - 1 for request, left in self.left.items() if left > 1}
        return found

def losses(model, threads, windows):
    print("some library says hello")
    match model.read_text():
        case "breaks":
            raise RuntimeError("out of luck")
        case "leaves":
            print("last words", flush=True)
            os._exit(0)
        case "forgets":
            return []
        case "overflows":
            return [float("nan")] * len(windows)
    print({"losses": "not the answer"})
    return [threads * sum(window) for window in windows]

if __name__ == "__main__":
    serve(speeds=timed(Steps), losses=losses)
'''
VOCABULARY, WINDOWS = 11, [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9]]
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)  # of the token before


class Fake(Peer):
    name = "fake"
    widths = ("bf16",)
    __module__ = "the_runner"

    def __init__(self, name: str = "fake", there: bool = True) -> None:
        self.name, self.there = name, there

    def install(self, work: Path) -> None:
        self.there = True

    def installed(self, work: Path) -> bool:
        return self.there

    def python(self, work: Path) -> Path:
        return Path(sys.executable)

    def version(self, work: Path) -> str: ...  # type: ignore[empty-body]
    def convert(self, *arguments: Any) -> Path: ...  # type: ignore[empty-body]
    def run(self, *arguments: Any) -> Any: ...
    def losses(self, model: Path, width: str, threads: int, windows: Any, work: Path) -> list[float]:
        return self.run_scorer(model, threads, windows, work, {"PYTHONPATH": str(work)})


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "the_runner.py").write_text(RUNNER)
    return tmp_path


def model(work: Path, does: str) -> Path:
    file = work / "model"
    file.write_text(does)
    return file


def test_windows_go_to_a_process_and_losses_come_back(work: Path) -> None:
    assert Fake().losses(model(work, "works"), "bf16", 2, WINDOWS, work) == [62, 16, 44]


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("breaks", "ended with 1: RuntimeError: out of luck"),
        ("leaves", "fake gave no losses: last words"),
        ("forgets", "no finite loss for each window"),
        ("overflows", "no finite loss for each window"),
    ],
)
def test_a_runner_that_does_not_answer_is_a_peer_error(does: str, told: str, work: Path) -> None:
    with pytest.raises(PeerError, match=told):
        Fake().losses(model(work, does), "bf16", 2, WINDOWS, work)


def test_speeds_go_the_same_way(work: Path) -> None:
    workload = Workload(prefill=4, batches=(1,), decode_prompt=2, decode_output=3, requests=2, request_output=2)
    speeds = Fake().run_stepper(model(work, ""), 1, workload, work, {"PYTHONPATH": str(work)})
    assert speeds.decode.keys() == {1}
    assert min(speeds.prefill or 0, speeds.decode[1], speeds.mixed or 0) > 0


def expected(window: Sequence[int]) -> float:
    """The chain rule, token by token."""
    nats = 0.0
    for before, token in pairwise(window):
        odds = np.exp(TABLE[before].astype(float))
        nats -= np.log(odds[token] / odds.sum())
    return float(nats)


def test_loss_is_of_all_tokens_but_the_first() -> None:
    for window in WINDOWS:
        assert loss(log_softmax(TABLE[window][:-1]), window) == pytest.approx(expected(window))


def test_log_softmax_of_large_logits() -> None:
    assert log_softmax(np.array([[1e4, 1e4]], np.float32)) == pytest.approx(np.log([[0.5, 0.5]]))


def fake_openvino() -> ModuleType:
    """Its state is what came since the last reset."""

    class Request:
        tokens = 0

        def reset_state(self) -> None:
            self.tokens = 0

        def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
            ids, count = inputs["input_ids"], inputs["input_ids"].shape[1]
            assert self.tokens == 0
            assert ids.shape == inputs["attention_mask"].shape == inputs["position_ids"].shape == (1, count)
            assert inputs["attention_mask"].all()
            assert inputs["position_ids"][0].tolist() == list(range(count))
            assert inputs["beam_idx"].tolist() == [0]
            self.tokens = count
            return {"logits": TABLE[ids]}

    compiled = SimpleNamespace(create_infer_request=Request)
    module = ModuleType("openvino")
    module.Core = lambda: SimpleNamespace(compile_model=lambda path, device, properties: compiled)  # type: ignore[attr-defined]
    return module


def fake_llama_cpp() -> ModuleType:
    class Llama:
        def __init__(self, path: str, n_ctx: int, logits_all: bool, **settings: Any) -> None:
            self.scores, self.tokens = np.full((n_ctx, VOCABULARY), np.nan, np.float32), 0

        def reset(self) -> None:
            self.tokens = 0

        def eval(self, tokens: Sequence[int]) -> None:
            self.scores[self.tokens : self.tokens + len(tokens)] = TABLE[tokens]
            self.tokens += len(tokens)

    module = ModuleType("llama_cpp")
    module.Llama = Llama  # type: ignore[attr-defined]
    return module


def fake_vllm() -> ModuleType:
    """Finishes what it was given last first; tells of each token its own log-probability, of the first nothing."""

    class Engine:
        def __init__(self) -> None:
            self.waiting: list[tuple[str, list[int]]] = []

        def add_request(self, request: str, prompt: dict[str, list[int]], sampling: Any) -> None:
            assert (sampling.prompt_logprobs, sampling.max_tokens) == (0, 1)
            self.waiting.append((request, prompt["prompt_token_ids"]))

        def has_unfinished_requests(self) -> bool:
            return bool(self.waiting)

        def step(self) -> list[SimpleNamespace]:
            request, ids = self.waiting.pop()
            likely: list[Any] = [None]
            for before, token in pairwise(ids):
                likely.append({token: SimpleNamespace(logprob=-expected([before, token]))})
            return [SimpleNamespace(request_id=request, prompt_token_ids=ids, prompt_logprobs=likely)]

    module: Any = ModuleType("vllm")
    module.EngineArgs, module.SamplingParams = SimpleNamespace, SimpleNamespace
    module.LLMEngine = SimpleNamespace(from_engine_args=lambda arguments: Engine())
    return module


@pytest.mark.parametrize(
    ("runner", "library"),
    [(openvino, fake_openvino()), (llama_cpp, fake_llama_cpp()), (vllm_cpu, fake_vllm())],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_runners_predict_each_token_from_those_before(
    runner: Any, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library.__name__, library)
    assert runner.losses(Path("model"), 2, WINDOWS) == pytest.approx([expected(window) for window in WINDOWS])


def test_those_installed_run_unless_others_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, missing = Fake("there"), Fake("missing", there=False)
    monkeypatch.setattr(choice, "PEERS", {"missing": missing, "there": there})
    told: list[str] = []
    assert chosen(None, tmp_path, told.append) == ["there"]
    assert told == [f"missing is not installed: python -m millrace.bench.peers missing --work-dir {tmp_path}"]
    assert chosen([], tmp_path, told.append) == []
    assert not missing.there
    assert chosen(["missing"], tmp_path, told.append) == ["missing"]
    assert missing.there

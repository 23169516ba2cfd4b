"""The serving bench on a tiny model: it runs, counts every token, and finds its own worker."""

from pathlib import Path

import pytest

from millrace.bench.checkpoints import checkpoint
from millrace.bench.serving import alone, served
from millrace.bench.workload import Workload
from millrace.server.config import EngineConfig


def test_a_tiny_run(tmp_path: Path) -> None:
    work = Workload(requests=3, request_prompt=8, request_output=5, decode_prompt=4)
    config = EngineConfig(
        model=str(checkpoint("tiny", tmp_path)),
        embedding_model="off",
        quantization="int8",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    speed, planned = alone(config, work)
    assert speed > 0
    assert planned > 0
    speed, resident = served(config, work)
    assert speed > 0
    assert resident > 1 << 20


def test_missing_tokens_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(checkpoint("tiny", tmp_path)), embedding_model="off", max_model_len=16)
    work = Workload(requests=2, request_prompt=8, request_output=30, decode_prompt=4)
    with pytest.raises(ValueError, match="tokens came, 60 were asked for"):
        served(config, work)

"""The bench of starting up, on a tiny model: what is read is read, and a start has a time and a memory."""

from pathlib import Path

import pytest

from millrace.bench.checkpoints import checkpoint
from millrace.bench.serving import MIB, server_flags
from millrace.bench.startup import forget, main, measure_start, read_seconds, weight_bytes
from millrace.server.config import EngineConfig


def test_reading_after_forgetting(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(3 * MIB))
    forget([file])
    assert read_seconds([file]) > 0
    assert file.stat().st_size == 3 * MIB


def test_a_start(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(checkpoint("tiny", tmp_path)), embedding_model="off", quantization="int8", max_model_len=64
    )
    start = measure_start(server_flags(config))
    assert start.seconds > 0
    assert weight_bytes(config) < start.resident <= start.most < 1024 * MIB


def test_no_such_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["startup", "--model", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "nowhere" in capsys.readouterr().err


def test_switches_are_flags_of_their_own_and_numbers_are_no_switches() -> None:
    config = EngineConfig(prefix_caching=False, max_num_seqs=1, num_threads=None)
    assert sorted(server_flags(config)) == ["--max-num-seqs=1", "--no-prefix-caching"]
    assert server_flags(EngineConfig(prefix_caching=True)) == ["--prefix-caching"]

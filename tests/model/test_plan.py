"""What is settled before memory is taken, and the refusals that say what to change."""

import builtins
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.server.config import EngineConfig
from millrace.server.errors import ConfigError, MissingDependency, NotEnoughMemory
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.executors import create_executor
from millrace.server.model.executors.plan import Plan, fixed_bytes, make_plan
from millrace.server.model.memory import available_memory

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def plan(checkpoint: Callable[[str], Path]) -> Callable[..., Plan]:
    """512 positions, 3 layers of 2 x 2 x 12 numbers: 9216 bytes to a block of 16 tokens."""
    spec = Checkpoint.open(checkpoint("llama")).spec
    return lambda available=8 * GIB, **settings: make_plan(
        EngineConfig(executor="reference", **settings), spec, {}, available
    )


def test_defaults(plan: Callable[..., Plan]) -> None:
    made = plan(max_num_seqs=4)
    assert (made.executor, made.dtype, made.max_model_len) == ("reference", "float32", 512)
    assert made.layout.block_size == 16
    assert made.layout.bytes_per_block == 9216
    assert made.layout.num_blocks == 4 * 32


def test_settings_are_taken_literally(plan: Callable[..., Plan]) -> None:
    made = plan(max_model_len=100, block_size=7, kv_cache_memory=9 * MIB)
    assert made.max_model_len == 100
    assert made.layout.block_size == 7
    assert made.layout.num_blocks == 9 * MIB // made.layout.bytes_per_block


def test_cache_takes_a_quarter_at_most_unless_one_sequence_needs_more(
    plan: Callable[..., Plan], checkpoint: Callable[[str], Path]
) -> None:
    spec = Checkpoint.open(checkpoint("llama")).spec
    fixed = fixed_bytes(spec, 512, 4096, 512)
    made = plan(fixed + 40 * MIB, max_num_seqs=4096)
    assert made.layout.num_blocks == 40 * MIB // 9216 // 4
    made = plan(fixed + 32 * 9216, max_num_seqs=4096)
    assert made.layout.num_blocks == 32
    with pytest.raises(NotEnoughMemory, match="--max-model-len to at most 496"):
        plan(fixed + 32 * 9216 - 1, max_num_seqs=4096)


def test_refusals_name_a_setting_that_then_works(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 513: the positions of this model end at 512"):
        plan(max_model_len=513)
    with pytest.raises(ConfigError, match="--kv-cache-memory") as caught:
        plan(kv_cache_memory=100_000)
    size, tokens = re.search(r"raise it to (\d+)MiB or .* at most (\d+)$", str(caught.value)).groups()
    assert plan(kv_cache_memory=int(size) * MIB).max_model_len == 512
    assert plan(kv_cache_memory=100_000, max_model_len=int(tokens)).max_model_len == int(tokens)
    with pytest.raises(NotEnoughMemory, match="lower --kv-cache-memory"):
        plan(kv_cache_memory=9 * GIB)
    with pytest.raises(NotEnoughMemory, match=r"take \d+MiB, 1MiB are free"):
        plan(MIB)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   500 kB\n"}, 500 * 1024),
        (
            {
                "proc/meminfo": "MemAvailable: 500 kB\n",
                "sys/fs/cgroup/memory.max": "300000\n",
                "sys/fs/cgroup/memory.current": "250000\n",
                "sys/fs/cgroup/memory.stat": "anon 7\ninactive_file 1000\n",
            },
            51_000,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 500 kB\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "250000\n",
                "sys/fs/cgroup/memory.stat": "inactive_file 1000\n",
            },
            500 * 1024,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 500 kB\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 3\n",
            },
            0,
        ),
    ],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == expected


def test_available_memory_of_this_machine() -> None:
    assert MIB < available_memory() < 1 << 50


def test_created_model_tells_what_it_is(checkpoint: Callable[[str], Path]) -> None:
    seen: list[tuple[int, int]] = []
    config = EngineConfig(
        model=str(checkpoint("qwen3")), executor="reference", max_num_seqs=3, max_num_batched_tokens=77, num_threads=1
    )
    loaded = create_executor(config, lambda *counts: seen.append(counts))
    info = loaded.info
    assert (info.architecture, info.executor, info.vocab_size) == ("Qwen3ForCausalLM", "reference", 384)
    assert (info.max_model_len, info.max_num_seqs, info.max_num_batched_tokens) == (512, 3, 77)
    assert (info.kv_block_size, info.kv_total_blocks) == (16, 3 * 32)
    assert info.parameters * 4 == seen[-1][1]
    assert len(info.fingerprint) == 64
    assert loaded.executor.kv_layout.num_blocks == info.kv_total_blocks


def test_without_pytorch_the_install_command_is_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *others: Any, **named: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *others, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependency, match=re.escape("pip install torch==2.13.0")):
        create_executor(EngineConfig(model=str(checkpoint("llama")), executor="reference"), lambda done, total: None)

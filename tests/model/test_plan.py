"""What is settled before memory is taken, and the refusals that say what to change."""

import builtins
import re
from collections.abc import Callable
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import pytest

from millrace.server.config import EngineConfig
from millrace.server.errors import ConfigError, MissingDependency, NotEnoughMemory
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.executors import LoadedModel, create_embedder, create_executor
from millrace.server.model.executors.base import KVLayout
from millrace.server.model.executors.cpu import CpuExecutor
from millrace.server.model.executors.cpu_weights import packed_bytes, stored_bytes
from millrace.server.model.executors.plan import Plan, fixed_bytes, make_plan, scratch_bytes
from millrace.server.model.executors.precision import ENCODER_PRECISION, make_precision
from millrace.server.model.executors.texts import pack_texts
from millrace.server.model.memory import available_memory
from millrace.server.model.weights import find_weights

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


Settings = dict[str, Any]
PRECISIONS: list[tuple[Settings, str]] = [
    ({}, "bf16"),
    ({"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}, "bf16"),
    ({"quantization": "int8"}, "int8"),
    ({"quantization": "int8", "head_quantization": "none"}, "int8, head bf16"),
    ({"quantization": "int4"}, "int4-g128, head int8"),
    ({"quantization": "int4", "quantization_group": 32, "kv_cache_dtype": "int8"}, "int4-g32, head int8, kv int8"),
    ({"quantization": "int4", "head_quantization": "int4"}, "int4-g128"),
    ({"head_quantization": "int4", "quantization_group": 32}, "bf16, head int4-g32"),
]
NAMES = ("llama", "llama-biases", "llama-tied", "llama-sharded", "qwen3-sliding")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("settings", "precision"), PRECISIONS, ids=[words for _, words in PRECISIONS])
def test_cpu_takes_what_was_planned(
    load: Callable[..., LoadedModel], checkpoint: Callable[[str], Path], name: str, settings: Settings, precision: str
) -> None:
    """Weights to the byte; of each KV block what the cache is laid out with."""
    config, opened = EngineConfig(**settings), Checkpoint.open(checkpoint(name))
    item_bytes = stored_bytes(find_weights(opened))
    made = make_plan(config, opened.spec, item_bytes, 8 * GIB)
    assert (made.executor, made.dtype, made.layout.block_size) == ("cpu", precision, 32)
    loaded = load(name, "cpu", **settings)
    assert isinstance(loaded.executor, CpuExecutor)
    assert loaded.executor.weight_bytes == packed_bytes(opened.spec, make_precision(config), item_bytes)
    assert len(loaded.executor.export_blocks([0])) == loaded.executor.kv_layout.bytes_per_block
    assert loaded.executor.kv_layout.bytes_per_block == made.layout.bytes_per_block


def test_cpu_takes_what_was_planned_of_an_encoder(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    for architecture in ("BertModel", "RobertaModel", "DistilBertModel"):
        directory = make_encoder(tmp_path / architecture, architecture)
        opened = Checkpoint.open_encoder(directory)
        executor = create_embedder(EngineConfig(num_threads=1), directory, lambda done, total: None).executor
        assert isinstance(executor, CpuExecutor)
        item_bytes = stored_bytes(find_weights(opened))
        assert executor.weight_bytes == packed_bytes(opened.spec, ENCODER_PRECISION, item_bytes)


def test_a_step_of_an_encoder_takes_what_was_planned(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    """Of address space, in whole huge pages: texts of one token each take a block each."""
    directory = make_encoder(tmp_path / "encoder", hidden_size=192, intermediate_size=192)
    executor = create_embedder(EngineConfig(num_threads=1), directory, lambda done, total: None).executor

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGESIZE

    before, texts = mapped(), pack_texts([[7]] * 512)
    executor.collect(executor.submit(texts))
    planned = scratch_bytes(Checkpoint.open_encoder(directory).spec, 512, 0)
    assert planned / 2 < mapped() - before < planned + 4 * MIB


def test_weights_shrink_with_their_width(load: Callable[..., LoadedModel]) -> None:
    """Of tiny matrices, whose padding and tables do not shrink, by less than the width says."""
    sizes = [
        load("llama", "cpu", **settings).executor.weight_bytes
        for settings in ({}, {"quantization": "int8"}, {"quantization": "int4"})
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize(
    ("settings", "message", "remedy"),
    [
        ({"dtype": "float32"}, "--dtype float32: .*add --executor reference", {"executor": "reference"}),
        ({"first_core": 4096}, r"--first-core 4096: this process may use \d+ cores", {"first_core": 0}),
        ({"block_size": 16}, "--block-size 16: .*keeps blocks of 32 tokens", {"block_size": 32}),
        ({"quantization_group": 32}, "--quantization-group .*add --quantization int4", {"quantization": "int4"}),
        (
            {"quantization_group": 128, "quantization": "int8"},
            "--quantization-group .*add --quantization int4",
            {"quantization": "int4"},
        ),
        (
            {"executor": "reference", "quantization": "int8"},
            "--quantization int8: the reference executor has float32 only",
            {"quantization": "none"},
        ),
        (
            {"executor": "reference", "quantization_group": 32},
            "--quantization-group 32: the reference executor has float32 only",
            {"quantization_group": None},
        ),
        (
            {"executor": "reference", "head_quantization": "int4"},
            "--head-quantization int4: the reference executor has float32 only",
            {"executor": "cpu"},
        ),
        (
            {"executor": "reference", "kv_cache_dtype": "int8"},
            "--kv-cache-dtype int8: the reference executor has float32 only",
            {"kv_cache_dtype": "auto"},
        ),
        (
            {"executor": "reference", "dtype": "bfloat16"},
            "--dtype bfloat16: the reference executor has float32 only",
            {"executor": "auto"},
        ),
    ],
)
def test_what_an_executor_cannot_do_names_a_setting_that_then_works(
    checkpoint: Callable[[str], Path], settings: Settings, message: str, remedy: Settings
) -> None:
    model = {"model": str(checkpoint("llama")), "max_num_seqs": 2, "num_threads": 1}
    with pytest.raises(ConfigError, match=message):
        create_executor(EngineConfig(**model | settings), lambda done, total: pytest.fail("something was read"))
    create_executor(EngineConfig(**model | settings | remedy), lambda done, total: None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_dim": 258}, "heads of 258; the cpu executor takes up to 256: add --executor reference"),
        ({"intermediate_size": 65_537}, "matrices of 65537 inputs; the cpu executor takes up to 65536"),
    ],
)
def test_shapes_that_kernels_have_no_room_for(
    make_checkpoint: Callable[..., Path], tmp_path: Path, overrides: Settings, message: str
) -> None:
    directory = make_checkpoint(tmp_path, "LlamaForCausalLM", **overrides)
    with pytest.raises(ConfigError, match=message):
        create_executor(EngineConfig(model=str(directory)), lambda done, total: pytest.fail("something was read"))


def test_cpu_counts_its_memory(checkpoint: Callable[[str], Path]) -> None:
    """What does not fit is refused, and what the message names then fits."""
    opened = Checkpoint.open(checkpoint("llama"))
    item_bytes = stored_bytes(find_weights(opened))

    def plan(available: int, **settings: Any) -> Plan:
        return make_plan(EngineConfig(**settings), opened.spec, item_bytes, available)

    fixed = packed_bytes(opened.spec, make_precision(EngineConfig()), item_bytes)
    fixed += scratch_bytes(opened.spec, 512, 256) + 64 * MIB
    block_bytes = (
        3 * 2 * 2 * 16 * 32 * 2
    )  # layers, keys and values, heads, their size of 12 filled up, tokens, bfloat16
    assert plan(8 * GIB).layout == KVLayout(32, 256 * 16, block_bytes)
    assert plan(8 * GIB, kv_cache_dtype="int8").layout.bytes_per_block == block_bytes // 2 + 3 * 2 * 2 * 32 * 4
    assert plan(fixed + 16 * block_bytes).layout.num_blocks == 16
    with pytest.raises(NotEnoughMemory, match="--max-model-len to at most 480"):
        plan(fixed + 16 * block_bytes - 1)
    assert plan(fixed + 16 * block_bytes - 1, max_model_len=480).layout.num_blocks == 15
    with pytest.raises(NotEnoughMemory, match=r"lower --max-num-batched-tokens or serve a smaller --model"):
        plan(fixed - 1)
    assert plan(fixed - 1, max_num_batched_tokens=64).max_model_len == 512
    with pytest.raises(ConfigError, match=r"raise it to 1MiB or set --max-model-len to at most 32$"):
        plan(8 * GIB, kv_cache_memory=block_bytes)
    assert plan(8 * GIB, kv_cache_memory=block_bytes, max_model_len=32).layout.num_blocks == 1


def test_a_machine_without_avx2_is_sent_to_the_reference(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"model": str(checkpoint("llama")), "max_num_seqs": 2, "num_threads": 1}
    monkeypatch.setenv("MILLRACE_ISA", "baseline")
    with pytest.raises(ConfigError, match=r"needs AVX2 and FMA; .* add --executor reference"):
        create_executor(EngineConfig(**model), lambda done, total: None)
    create_executor(EngineConfig(**model, executor="reference"), lambda done, total: None)
    monkeypatch.setenv("MILLRACE_ISA", "neon")
    with pytest.raises(ConfigError, match="MILLRACE_ISA=neon: this machine has baseline"):
        create_executor(EngineConfig(**model), lambda done, total: None)


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

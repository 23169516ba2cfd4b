"""Settles what a configuration leaves open, and whether it fits into memory, before anything is allocated."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from millrace.kernels import _C
from millrace.server.config import EngineConfig
from millrace.server.errors import ConfigError, NotEnoughMemory
from millrace.server.model.executors.base import KVLayout
from millrace.server.model.executors.cpu_weights import packed_bytes
from millrace.server.model.executors.precision import ENCODER_PRECISION, make_precision
from millrace.server.model.memory import available_memory
from millrace.server.model.spec import ModelSpec

REFERENCE_BLOCK_SIZE = 16
FLOAT_BYTES = 4
MAX_SCORES = 1 << 24  # attention scores computed at once; bounds what a long context takes
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Plan:
    executor: str
    dtype: str
    max_model_len: int
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class Costs:
    """What an executor takes: bytes of a block, and of everything but the KV cache."""

    executor: str
    dtype: str
    block_size: int
    block_bytes: int
    fixed: int


def make_plan(
    config: EngineConfig, spec: ModelSpec, item_bytes: Mapping[str, int], available: int | None = None
) -> Plan:
    """`item_bytes`: of a number as the checkpoint stores it, by tensor name. `available`: bytes of memory, by default
    what this process can still get.

    Raises ConfigError for settings that contradict the model or each other, NotEnoughMemory for what does not
    fit; both say which setting to change.
    """
    available = available_memory() if available is None else available
    max_model_len = config.max_model_len or spec.context
    if max_model_len > spec.context:
        raise ConfigError(f"--max-model-len {max_model_len}: the positions of this model end at {spec.context}")
    costs = _cpu_costs(config, spec, item_bytes) if uses_cpu(config) else _reference_costs(config, spec, max_model_len)
    block_size, block_bytes, fixed = costs.block_size, costs.block_bytes, costs.fixed
    needed = -(-max_model_len // block_size)  # blocks of one sequence of full length
    if fixed > available:
        raise NotEnoughMemory(
            f"weights and working memory of {spec.architecture} take {_mib(fixed)}, {_mib(available)} are free: "
            f"free some, lower --max-num-batched-tokens or serve a smaller --model"
        )
    if config.kv_cache_memory is None:
        blocks = _default_blocks(needed, config.max_num_seqs, (available - fixed) // block_bytes)
    else:
        blocks = int(config.kv_cache_memory) // block_bytes
        if blocks < needed:
            raise ConfigError(
                f"--kv-cache-memory {_mib(config.kv_cache_memory)} holds {blocks * block_size} tokens: "
                f"raise it to {_mib(needed * block_bytes)} or set --max-model-len to at most {blocks * block_size}"
            )
    if fixed + blocks * block_bytes > available:
        raise NotEnoughMemory(
            f"the KV cache takes {_mib(blocks * block_bytes)} beside {_mib(fixed)} of weights and working memory, "
            f"{_mib(available)} are free: {_remedy(config, (available - fixed) // block_bytes * block_size)}"
        )
    return Plan(costs.executor, costs.dtype, max_model_len, KVLayout(block_size, blocks, block_bytes))


def plan_encoder(
    config: EngineConfig, spec: ModelSpec, item_bytes: Mapping[str, int], available: int | None = None
) -> KVLayout:
    """The layout of a model that keeps nothing. Raises NotEnoughMemory where it does not fit beside what is loaded."""
    available = available_memory() if available is None else available
    if uses_cpu(config):
        _check_shape(spec)
        needed = packed_bytes(spec, ENCODER_PRECISION, item_bytes) + scratch_bytes(spec, spec.context, 0)
    else:
        # Texts run one at a time, so the longest one bounds what a step takes.
        needed = fixed_bytes(spec, spec.context, 0, spec.context)
    if needed > available:
        raise NotEnoughMemory(
            f"weights and working memory of {spec.architecture} take {_mib(needed)}, {_mib(available)} are free: "
            f"free some, or set --embedding-model to a smaller one or to 'off'"
        )
    return KVLayout(_C.BLOCK_TOKENS if uses_cpu(config) else REFERENCE_BLOCK_SIZE, 0, 0)


def uses_cpu(config: EngineConfig) -> bool:
    """Whether the native runtime runs the model. Raises ConfigError where this machine has not what it needs."""
    if config.executor == "reference":
        return False
    if instruction_set() == "baseline":
        raise ConfigError(
            "the cpu executor needs AVX2 and FMA; this machine has not, or MILLRACE_ISA leaves them out: "
            "add --executor reference"
        )
    return True


def instruction_set() -> str:
    """What kernels run with. Raises ConfigError where MILLRACE_ISA names what this machine has not."""
    try:
        return _C.isa()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _cpu_costs(config: EngineConfig, spec: ModelSpec, item_bytes: Mapping[str, int]) -> Costs:
    block_size = _C.BLOCK_TOKENS
    if config.block_size not in (None, block_size):
        raise ConfigError(f"--block-size {config.block_size}: the cpu executor keeps blocks of {block_size} tokens")
    cores = len(os.sched_getaffinity(0))
    if config.first_core >= cores:
        raise ConfigError(f"--first-core {config.first_core}: this process may use {cores} cores, counted from 0")
    _check_shape(spec)
    precision = make_precision(config)
    kept = [layer.attention for layer in spec.layers if layer.attention.causal]
    block_bytes = sum(_C.kv_block_bytes(precision.kv, a.kv_heads, a.head_dim) for a in kept)
    fixed = packed_bytes(spec, precision, item_bytes)
    fixed += scratch_bytes(spec, config.max_num_batched_tokens, config.max_num_seqs) + 64 * MIB
    return Costs("cpu", str(precision), block_size, block_bytes, fixed)


def _check_shape(spec: ModelSpec) -> None:
    """ConfigError for what the native kernels have no room for."""
    for layer in spec.layers:
        attention = layer.attention
        if attention.head_dim > _C.MAX_HEAD_DIM:
            raise ConfigError(
                f"{spec.architecture} has heads of {attention.head_dim}; the cpu executor takes up to "
                f"{_C.MAX_HEAD_DIM}: add --executor reference"
            )
        widest = max(spec.hidden_size, attention.heads * attention.head_dim, layer.mlp.size)
        if widest > _C.MAX_INPUTS:
            raise ConfigError(
                f"{spec.architecture} has matrices of {widest} inputs; the cpu executor takes up to {_C.MAX_INPUTS}: "
                f"add --executor reference"
            )


def _reference_costs(config: EngineConfig, spec: ModelSpec, max_model_len: int) -> Costs:
    for name in ("quantization", "quantization_group", "head_quantization", "kv_cache_dtype", "dtype"):
        if getattr(config, name) not in ("none", "auto", "float32", None):
            words = name.replace("_", "-")
            raise ConfigError(f"--{words} {getattr(config, name)}: the reference executor has float32 only")
    block_size = config.block_size or REFERENCE_BLOCK_SIZE
    block_bytes = spec.kv_floats_per_token * block_size * FLOAT_BYTES
    fixed = fixed_bytes(spec, config.max_num_batched_tokens, config.max_num_seqs, max_model_len)
    return Costs("reference", "float32", block_size, block_bytes, fixed)


def scratch_bytes(spec: ModelSpec, tokens: int, sequences: int) -> int:
    """The arrays of a step of the cpu executor, rounded up. An encoder's texts may each be one token in a block."""
    widths = [(layer.attention.heads + layer.attention.kv_heads) * layer.attention.head_dim for layer in spec.layers]
    mlp = max(layer.mlp.size for layer in spec.layers)
    row = 4 * (3 * spec.hidden_size + 3 * max(widths)) + 6 * mlp
    texts = 0
    if not spec.causal:
        blocks = tokens + tokens // _C.BLOCK_TOKENS
        attention = [layer.attention for layer in spec.layers]
        texts = blocks * max(_C.kv_block_bytes("bf16", a.kv_heads, a.head_dim) for a in attention)
    return tokens * row + min(sequences, tokens) * spec.vocab_size * FLOAT_BYTES + texts


def fixed_bytes(spec: ModelSpec, tokens: int, sequences: int, context: int) -> int:
    """Memory of everything but the KV cache in the reference executor: weights, the widest arrays of a step, and
    64 MiB for the rest."""
    attention = [layer.attention for layer in spec.layers]
    scores = min(tokens * context * max(a.heads for a in attention), MAX_SCORES)
    gathered = context * max(a.kv_heads * a.head_dim for a in attention) * 2
    hidden = tokens * (spec.hidden_size * 6 + max(layer.mlp.size for layer in spec.layers) * 3)
    logits = min(sequences, tokens) * spec.vocab_size
    step = scores * 3 + gathered * 2 + hidden + logits * 2
    return (spec.parameters + step) * FLOAT_BYTES + tokens * context * 3 + 64 * MIB


def _default_blocks(needed: int, sequences: int, fitting: int) -> int:
    """Room for all sequences at full length, in at most a quarter of what fits, unless one of them needs more."""
    return min(sequences * needed, max(fitting // 4, needed))


def _remedy(config: EngineConfig, fitting_tokens: int) -> str:
    if config.kv_cache_memory is not None:
        return "lower --kv-cache-memory"
    return f"set --max-model-len to at most {fitting_tokens}" if fitting_tokens else "serve a smaller --model"


def _mib(size: int) -> str:
    """As a setting takes it, rounded up."""
    return f"{-(-size // MIB)}MiB"

"""Checkpoints made once, and steps packed by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from millrace.server.config import EngineConfig
from millrace.server.model.executors import LoadedModel, create_executor
from millrace.server.model.executors.base import (
    Batch,
    Executor,
    Output,
    Placeholder,
    SamplingColumns,
    StepResult,
    Ticket,
    TokenMask,
)
from millrace.server.model.executors.cpu import CpuExecutor
from millrace.server.model.executors.reference import ReferenceExecutor

ROPE = {"rope_theta": 10_000.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_new"}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 4, "hidden_act": "gelu"}),
    "llama-sharded": ("LlamaForCausalLM", {"shard_size": "100KB", "num_key_value_heads": 1, "head_dim": 20}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("LlamaForCausalLM", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-yarn-fine": (
        "LlamaForCausalLM",
        {"rope_parameters": YARN | {"truncate": False, "beta_fast": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "mistral": ("MistralForCausalLM", {}),
    "mistral-full": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 130, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "qwen3-sliding": (
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 19,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory by its name in CHECKPOINTS, made on first use; not to be written to."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            architecture, overrides = CHECKPOINTS[name]
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), architecture, **overrides)
        return made[name]

    return get


@pytest.fixture(scope="session")
def load(checkpoint: Callable[[str], Path]) -> Callable[..., LoadedModel]:
    """`load(name, **settings)`: a fresh executor, the reference with 128 blocks of 16 unless settings say otherwise.

    Of the cpu executor 64 blocks of 32, and one thread.
    """

    def load(name: str, executor: str = "reference", **settings: Any) -> LoadedModel:
        directory = str(checkpoint(name))
        config = EngineConfig(model=directory, max_num_seqs=4, executor=executor, num_threads=1, **settings)
        return create_executor(config, lambda done, total: None)

    return load


@dataclass
class Row:
    """A piece of a sequence. An id is a number, or (ticket, row) of a placeholder; the last `drafts` are drafts."""

    ids: Sequence[int | tuple[int, int]]
    start: int = 0
    blocks: Sequence[int] = tuple(range(32))
    output: Output = Output.SAMPLE
    drafts: int = 0
    history: Sequence[int] = ()
    prompt_len: int = 0
    mask: Sequence[int] | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)


OFF = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "seed": 0, "choice": 0, "top_n": -1,
}  # fmt: skip
DTYPES = {"top_k": np.int32, "seed": np.uint64, "choice": np.int32, "top_n": np.int32}


def columns(rows: Sequence[Row]) -> SamplingColumns:
    drawn = [row for row in rows if row.output == Output.SAMPLE]
    return SamplingColumns(
        **{
            name: np.array([row.sampling.get(name, off) for row in drawn], DTYPES.get(name, np.float32))
            for name, off in OFF.items()
        },
        position=np.array([row.start + len(row.ids) - row.drafts for row in drawn], np.int32),
        bias_offsets=np.zeros(len(drawn) + 1, np.int32),
        bias_ids=np.empty(0, np.int32),
        bias_values=np.empty(0, np.float32),
        history_offsets=np.cumsum([0, *(len(row.history) for row in drawn)]).astype(np.int32),
        history_ids=np.array([token for row in drawn for token in row.history], np.int32),
        history_prompt_lens=np.array([row.prompt_len for row in drawn], np.int32),
    )


def pack(rows: Sequence[Row], block_size: int = 16, vocab_size: int = 384, **others: Any) -> Batch:
    ids, positions, slots, placeholders, masks = [], [], [], [], []
    for row in rows:
        for position, token in enumerate(row.ids, row.start):
            if isinstance(token, tuple):
                placeholders.append(Placeholder(len(ids), *token))
            ids.append(-1 if isinstance(token, tuple) else token)
            positions.append(position)
            slots.append(row.blocks[position // block_size] * block_size + position % block_size)
    for index, row in enumerate(row for row in rows if row.output == Output.SAMPLE):
        if row.mask is not None:
            bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
            bits[list(row.mask)] = 1
            masks.append(TokenMask(index, np.packbits(bits, bitorder="little").view(np.uint32)))
    widest = max(len(row.blocks) for row in rows)
    return Batch(
        token_ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int32),
        offsets=np.cumsum([0, *(len(row.ids) for row in rows)]).astype(np.int32),
        context_lens=np.array([row.start + len(row.ids) for row in rows], np.int32),
        block_tables=np.array([[*row.blocks, *[-1] * (widest - len(row.blocks))] for row in rows], np.int32),
        outputs=np.array([row.output for row in rows], np.int32),
        draft_lens=np.array([row.drafts for row in rows], np.int32),
        adapters=np.full(len(rows), -1, np.int32),
        sampling=columns(rows),
        placeholders=placeholders,
        masks=masks,
        **others,
    )


def submit(executor: Executor, rows: Sequence[Row], **others: Any) -> Ticket:
    return executor.submit(pack(rows, executor.kv_layout.block_size, **others))


def run(executor: Executor, rows: Sequence[Row], **others: Any) -> StepResult:
    return executor.collect(submit(executor, rows, **others))


def tokens(result: StepResult, row: int) -> list[int]:
    return result.token_ids[result.offsets[row] : result.offsets[row + 1]].tolist()


def generate(
    executor: Executor,
    prompt: Sequence[int],
    count: int,
    blocks: Sequence[int] = tuple(range(32)),
    **sampling: float,
) -> list[int]:
    """The plain way: one sequence, one token a step, every token read before the next step."""
    sequence = list(prompt)
    piece: Sequence[int] = prompt
    while len(sequence) < len(prompt) + count:
        start = len(sequence) - len(piece)
        row = Row(piece, start, blocks, history=sequence, prompt_len=len(prompt), sampling=sampling)
        result = run(executor, [row])
        assert result.errors == {}
        sequence += tokens(result, 0)
        piece = sequence[-1:]
    return sequence[len(prompt) :]


@torch.inference_mode()
def step_logits(executor: Executor, rows: Sequence[Row]) -> torch.Tensor:
    """float32 [tokens, vocabulary] of every token of a step, whose rows are of tokens only."""
    if isinstance(executor, CpuExecutor):
        run(executor, [replace(row, output=Output.SAMPLE, drafts=len(row.ids) - 1) for row in rows])
        return torch.from_numpy(executor.logits.copy())
    assert isinstance(executor, ReferenceExecutor)
    batch = pack(rows, executor.kv_layout.block_size)
    return executor.model.logits(executor.model.forward(batch, torch.from_numpy(batch.token_ids).long()))


def all_logits(executor: Executor, prompt: Sequence[int], chunk: int, blocks: Sequence[int]) -> torch.Tensor:
    """float32 [prompt, vocabulary], computed in chunks."""
    starts = range(0, len(prompt), chunk)
    return torch.cat([step_logits(executor, [Row(prompt[at : at + chunk], at, blocks)]) for at in starts])


@pytest.fixture(scope="session")
def steps() -> SimpleNamespace:
    """The helpers above, for test modules, which cannot import a conftest."""
    return SimpleNamespace(
        Row=Row,
        Output=Output,
        pack=pack,
        submit=submit,
        run=run,
        tokens=tokens,
        generate=generate,
        step_logits=step_logits,
        all_logits=all_logits,
    )


@pytest.fixture(scope="session")
def checkpoint_names() -> list[str]:
    return list(CHECKPOINTS)

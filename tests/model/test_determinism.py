"""The contract of the cpu executor: a request has the same bits alone, in any batch, in any chunks, on any threads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from millrace.kernels import _C
from millrace.server.config import EngineConfig
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.executors.base import Executor, KVLayout
from millrace.server.model.executors.cpu import CpuExecutor
from millrace.server.model.executors.cpu_weights import stored_bytes
from millrace.server.model.executors.plan import make_plan
from millrace.server.model.executors.precision import make_precision
from millrace.server.model.weights import find_weights

BLOCK = _C.BLOCK_TOKENS
BATCHES = 64
LENGTHS = (1, 2, 31, 32, 33, 63, 90, 129, 256, 257, 310)
CHUNKS = (1, 1, 1, 1, 2, 5, 17, 31, 32, 33, 64, 130)
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4", "quantization_group": 32, "head_quantization": "int4"},
    "int8, kv int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4-g128, kv int8": {"quantization": "int4", "kv_cache_dtype": "int8"},
}
ISAS = [isa for isa in _C.available_isas() if isa != "baseline"]
if "avx512_bf16" in ISAS:
    ISAS.append("amx_emulated")
ARCHITECTURES = ("llama-biases", "llama-tied", "llama-sharded", "mistral", "qwen2-sliding", "qwen3", "qwen3-sliding")


def load(directory: Path, threads: int, **settings: Any) -> CpuExecutor:
    """With room for 256 blocks, on threads of its own."""
    config = EngineConfig(model=str(directory), executor="cpu", **settings)
    checkpoint = Checkpoint.open(directory)
    found = find_weights(checkpoint)
    layout = make_plan(config, checkpoint.spec, stored_bytes(found)).layout
    layout = KVLayout(layout.block_size, 256, layout.bytes_per_block)
    return CpuExecutor(checkpoint.spec, found, make_precision(config), layout, _C.Pool(threads), lambda *counts: None)


@pytest.fixture(scope="module")
def wide(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several blocks of every matrix, none of them full, and a context that two spans of attention share."""
    sizes = {"hidden_size": 200, "intermediate_size": 330, "head_dim": 40, "num_hidden_layers": 2}
    return make_checkpoint(tmp_path_factory.mktemp("wide"), "LlamaForCausalLM", **sizes)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    return str(request.param)


@dataclass
class Stream:
    """A prompt that is read piece by piece into blocks of its own, over and over."""

    ids: list[int]
    blocks: list[int]
    done: int = 0


def random_steps(
    draw: np.random.Generator, prompts: Sequence[list[int]], steps: SimpleNamespace
) -> Iterator[tuple[list[int], list[Any]]]:
    """Batches of pieces: which prompts, and their rows."""
    blocks = draw.permutation(256).tolist()
    streams = []
    for ids in prompts:
        count = -(-len(ids) // BLOCK)
        streams.append(Stream(ids, blocks[:count]))
        del blocks[:count]
    for _ in range(BATCHES):
        chosen = draw.permutation(len(streams))[: draw.integers(1, len(streams) + 1)].tolist()
        rows = []
        for index in chosen:
            stream = streams[index]
            if stream.done == len(stream.ids):  # again, from the start or behind a prefix that is there
                stream.done = int(draw.integers(len(stream.ids)))
                if draw.random() < 0.3:
                    stream.done = 0
                    draw.shuffle(stream.blocks)
            piece = stream.ids[stream.done : stream.done + int(draw.choice(CHUNKS))]
            rows.append(steps.Row(piece, stream.done, tuple(stream.blocks)))
            stream.done += len(piece)
        yield chosen, rows


def assert_same_bits(alone: Executor, others: Sequence[Executor], steps: SimpleNamespace, seed: int = 0) -> None:
    """Every logit in random batches on each of `others` is the one that `alone` computes in one piece."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(5, 384, length).tolist() for length in LENGTHS]
    expected = [steps.all_logits(alone, ids, len(ids), range(16)) for ids in prompts]
    for executor in others:
        for chosen, rows in random_steps(draw, prompts, steps):
            actual = steps.step_logits(executor, rows)
            wanted = torch.cat(
                [expected[index][row.start : row.start + len(row.ids)] for index, row in zip(chosen, rows, strict=True)]
            )
            assert torch.equal(actual, wanted), [(row.start, len(row.ids)) for row in rows]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_batch_chunks_and_threads(isa: str, precision: str, wide: Path, steps: SimpleNamespace) -> None:
    executors = [load(wide, threads, **PRECISIONS[precision]) for threads in (1, 2, 3)]
    assert_same_bits(load(wide, 1, **PRECISIONS[precision]), executors, steps)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["bf16", "int4-g128, kv int8"])
def test_any_architecture(name: str, precision: str, checkpoint: Callable[[str], Path], steps: SimpleNamespace) -> None:
    settings = PRECISIONS[precision]
    assert_same_bits(load(checkpoint(name), 1, **settings), [load(checkpoint(name), 2, **settings)], steps)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_samples_and_log_probabilities(precision: str, wide: Path, steps: SimpleNamespace) -> None:
    """Sixteen requests with samplings of their own, together in random steps: all that each yields alone."""
    alone, together = load(wide, 1, **PRECISIONS[precision]), load(wide, 2, **PRECISIONS[precision])
    draw = np.random.default_rng(1)
    prompts = [draw.integers(5, 384, 1 + 7 * index).tolist() for index in range(16)]
    samplings = [
        {"temperature": 0.25 * (index % 5), "seed": index, "top_p": 0.95, "repetition_penalty": 1.2, "top_n": 3}
        for index in range(16)
    ]
    yields = []
    for ids, sampling in zip(prompts, samplings, strict=True):
        sequence, news = list(ids), []
        while len(news) < 6:
            piece = sequence if not news else sequence[-1:]
            start = len(sequence) - len(piece)
            news.append(sampled(alone, [steps.Row(piece, start, **known(sequence, ids, sampling))], steps)[0])
            sequence.append(news[-1][0])
        yields.append(news)

    blocks = draw.permutation(256).reshape(16, 16)[:, :8].tolist()
    sequences, dones, news = [list(ids) for ids in prompts], [0] * 16, [[] for _ in prompts]
    while any(len(mine) < 6 for mine in news):
        waiting = [index for index in range(16) if len(news[index]) < 6]
        chosen = [index for index in draw.permutation(waiting).tolist() if draw.random() < 0.7]
        rows = []
        for index in chosen:
            end = min(len(sequences[index]), dones[index] + int(draw.choice(CHUNKS)))
            output = steps.Output.SAMPLE if end == len(sequences[index]) else steps.Output.NOTHING
            piece = sequences[index][dones[index] : end]
            facts = known(sequences[index], prompts[index], samplings[index])
            rows.append(steps.Row(piece, dones[index], tuple(blocks[index]), output, **facts))
            dones[index] = end
        for index, mine in zip(chosen, sampled(together, rows, steps) if rows else [], strict=True):
            if mine:
                news[index].append(mine)
                sequences[index].append(mine[0])
    assert news == yields


def known(sequence: list[int], prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    return {"history": tuple(sequence), "prompt_len": len(prompt), "sampling": sampling}


def sampled(executor: Executor, rows: list[Any], steps: SimpleNamespace) -> list[tuple[Any, ...]]:
    """Of each row its token with log-probabilities, or nothing."""
    result = steps.run(executor, rows)
    assert result.errors == {}
    found: list[tuple[Any, ...]] = []
    for begin, end in zip(result.offsets, result.offsets[1:], strict=False):
        if begin == end:
            found.append(())
            continue
        tops = slice(*result.top_offsets[begin : begin + 2])
        found.append(
            (
                int(result.token_ids[begin]),
                float(result.logprobs[begin]),
                *result.top_token_ids[tops].tolist(),
                *result.top_logprobs[tops].tolist(),
            )
        )
    return found

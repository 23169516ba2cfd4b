"""The logits of our executors after every token of a window."""

import numpy as np
from numpy.typing import NDArray

from millrace.server.model.executors.base import Batch, Executor, Output, SamplingColumns
from millrace.server.model.executors.cpu import CpuExecutor

Logits = NDArray[np.float32]


def all_logits(executor: Executor, window: NDArray[np.int32]) -> Logits:
    """[tokens, vocabulary]; `window`: token ids."""
    batch = prefill(window, executor.kv_layout.block_size)
    if isinstance(executor, CpuExecutor):
        executor.collect(executor.submit(batch))
        return executor.logits
    return reference_logits(executor, batch)


def reference_logits(executor: Executor, batch: Batch) -> Logits:
    import torch

    from millrace.server.model.executors.reference import ReferenceExecutor

    assert isinstance(executor, ReferenceExecutor)
    ids = torch.from_numpy(batch.token_ids).long()
    with torch.inference_mode():
        found: Logits = executor.model.logits(executor.model.forward(batch, ids)).numpy()
    return found


def prefill(window: NDArray[np.int32], block_size: int) -> Batch:
    """Each token but the first is a draft, so a token is drawn after every one."""
    count = len(window)
    positions = np.arange(count, dtype=np.int32)
    return Batch(
        token_ids=window,
        positions=positions,
        slots=positions,
        offsets=np.array([0, count], np.int32),
        context_lens=np.array([count], np.int32),
        block_tables=np.arange(-(-count // block_size), dtype=np.int32)[None],
        outputs=np.array([Output.SAMPLE], np.int32),
        draft_lens=np.array([count - 1], np.int32),
        adapters=np.array([-1], np.int32),
        sampling=greedy(),
    )


def greedy() -> SamplingColumns:
    """Of one row."""
    real, whole, none = np.zeros(1, np.float32), np.zeros(1, np.int32), np.empty(0, np.int32)
    return SamplingColumns(
        temperature=real,
        top_p=real + 1,
        top_k=whole,
        min_p=real,
        presence_penalty=real,
        frequency_penalty=real,
        repetition_penalty=real + 1,
        seed=np.zeros(1, np.uint64),
        choice=whole,
        position=whole,
        top_n=whole - 1,
        bias_offsets=np.zeros(2, np.int32),
        bias_ids=none,
        bias_values=np.empty(0, np.float32),
        history_offsets=np.zeros(2, np.int32),
        history_ids=none,
        history_prompt_lens=whole,
    )

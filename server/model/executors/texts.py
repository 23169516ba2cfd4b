"""Batches of whole texts, as an encoder takes them: each row one text, nothing kept, one vector out."""

from collections.abc import Sequence

import numpy as np

from millrace.server.model.executors.base import Batch, Output, SamplingColumns

_INTS, _FLOATS = np.empty(0, np.int32), np.empty(0, np.float32)
NO_SAMPLING = SamplingColumns(
    temperature=_FLOATS, top_p=_FLOATS, top_k=_INTS, min_p=_FLOATS, presence_penalty=_FLOATS,
    frequency_penalty=_FLOATS, repetition_penalty=_FLOATS, seed=np.empty(0, np.uint64), choice=_INTS, position=_INTS,
    top_n=_INTS, bias_offsets=np.zeros(1, np.int32), bias_ids=_INTS, bias_values=_FLOATS,
    history_offsets=np.zeros(1, np.int32), history_ids=_INTS, history_prompt_lens=_INTS,
)  # fmt: skip


def pack_texts(rows: Sequence[Sequence[int]]) -> Batch:
    """`rows`: token ids of each text, special tokens included."""
    lengths = np.array([len(row) for row in rows], np.int32)
    count, tokens = len(rows), int(lengths.sum())
    return Batch(
        token_ids=np.fromiter((token for row in rows for token in row), np.int32, tokens),
        positions=np.concatenate([_INTS, *(np.arange(length, dtype=np.int32) for length in lengths)]),
        slots=np.full(tokens, -1, np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        context_lens=lengths,
        block_tables=np.empty((count, 0), np.int32),
        outputs=np.full(count, Output.POOLED, np.int32),
        draft_lens=np.zeros(count, np.int32),
        adapters=np.full(count, -1, np.int32),
        sampling=NO_SAMPLING,
    )


def check_texts(batch: Batch, context: int) -> None:
    """Raise ValueError where a row is no whole text of 1 to `context` tokens, or asks for something but a vector."""
    lengths = np.diff(batch.offsets)
    if lengths.min(initial=context) < 1 or lengths.max(initial=1) > context:
        raise ValueError(f"a text has {lengths.min()} to {lengths.max()} tokens, not 1 to {context}")
    if batch.positions[batch.offsets[:-1]].any() or (batch.context_lens != lengths).any():
        raise ValueError("a row is a piece of a text; an encoder reads whole ones")
    if (batch.outputs != Output.POOLED).any():
        raise ValueError("an encoder yields vectors and nothing else")

"""Between a batch and the sampler: which logits are drawn from, and which draws count. For every executor.

A row with d drafts draws d + 1 tokens: after its last known token and after each draft. Each draw depends
only on (seed, choice, position) and the tokens before it, so a draft is right exactly if the draw before it
selects it, and the draws up to the first wrong draft are what plain decoding would have given.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.kernels.sampling import SampleResult
from millrace.server.model.executors.base import (
    Batch,
    Float32,
    Int32,
    Output,
    SamplingColumns,
    StepResult,
    TokenMask,
)

SAMPLE = int(Output.SAMPLE)  # comparing arrays with members of an enum is slow
NO_DRAWS = SampleResult(
    token_ids=np.empty(0, np.int32),
    logprobs=np.empty(0, np.float32),
    top_offsets=np.zeros(1, np.int32),
    top_token_ids=np.empty(0, np.int32),
    top_logprobs=np.empty(0, np.float32),
    errors={},
)


@dataclass(frozen=True, slots=True)
class Draws:
    """D draws of S rows. Sample row s owns draws first[s]:first[s + 1]; draw i reads token `tokens[i]`'s logits."""

    rows: Int32  # [S] row of the batch
    first: Int32  # [S + 1]
    tokens: Int32  # [D] index into the batch's tokens
    sampling: SamplingColumns  # of D rows
    masks: Sequence[TokenMask]


def plan_draws(batch: Batch, token_ids: Int32) -> Draws:
    """`token_ids`: those of the batch with placeholders filled in."""
    rows = np.flatnonzero(batch.outputs == SAMPLE).astype(np.int32)
    drafts = batch.draft_lens[rows]
    if not batch.placeholders and not drafts.any():  # most steps: each row draws once
        first = np.arange(len(rows) + 1, dtype=np.int32)
        return Draws(rows, first, batch.offsets[rows + 1] - 1, batch.sampling, batch.masks)
    first = _offsets(drafts + 1)
    owner = np.repeat(np.arange(len(rows), dtype=np.int32), drafts + 1)
    ahead = np.arange(first[-1], dtype=np.int32) - first[owner]
    tokens = batch.offsets[rows + 1][owner] - 1 - drafts[owner] + ahead
    sampling = batch.sampling
    additions = _additions(batch, token_ids, rows, drafts)
    if drafts.any() or any(addition.size for addition in additions):
        sampling = _expand(sampling, owner, ahead, additions)
    masks = [
        TokenMask(draw, mask.words, mask.is_ready)
        for mask in batch.masks
        for draw in range(first[mask.row], first[mask.row + 1])
    ]
    return Draws(rows, first, tokens, sampling, masks)


def _additions(batch: Batch, token_ids: Int32, rows: Int32, drafts: Int32) -> list[Int32]:
    """What each sample row's history lacks: its placeholder tokens, then its drafts."""
    s = batch.sampling
    penalised = (s.presence_penalty != 0) | (s.frequency_penalty != 0) | (s.repetition_penalty != 1)
    filled = np.zeros(len(token_ids), bool)
    filled[[placeholder.index for placeholder in batch.placeholders]] = True
    additions = []
    for row, drafted, has_history in zip(rows, drafts, penalised, strict=True):
        span = slice(batch.offsets[row], batch.offsets[row + 1])
        known, ids = filled[span], token_ids[span].copy()
        known[len(ids) - drafted :] = True
        additions.append(ids[known] if has_history else ids[:0])
    return additions


def _expand(columns: SamplingColumns, owner: Int32, ahead: Int32, additions: Sequence[Int32]) -> SamplingColumns:
    """Repeat the row of each draw's owner; draw number k of a row knows all but the row's drafts from k on."""
    histories = []
    for row, k in zip(owner, ahead, strict=True):
        known = columns.history_ids[columns.history_offsets[row] : columns.history_offsets[row + 1]]
        unknown = int((owner == row).sum()) - 1 - k
        added = additions[row][: max(additions[row].size - unknown, 0)]
        histories.append(np.concatenate((known, added)))
    biases = [slice(columns.bias_offsets[row], columns.bias_offsets[row + 1]) for row in owner]
    return replace(
        columns,
        **{name: getattr(columns, name)[owner] for name in _SCALARS},
        position=columns.position[owner] + ahead,
        bias_offsets=_offsets(np.diff(columns.bias_offsets)[owner]),
        bias_ids=_join((columns.bias_ids[piece] for piece in biases), np.int32),
        bias_values=_join((columns.bias_values[piece] for piece in biases), np.float32),
        history_offsets=_offsets(np.array([len(history) for history in histories], np.int32)),
        history_ids=_join(histories, np.int32),
    )


_SCALARS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "choice", "top_n", "history_prompt_lens",
)  # fmt: skip


def accept_draws(
    batch: Batch, draws: Draws, sampled: SampleResult, pooled: Mapping[int, Float32], errors: Mapping[int, str]
) -> StepResult:
    """Keep each row's draws up to the first wrong draft. `errors`: rows that failed before they sampled."""
    if len(draws.tokens) == len(draws.rows) and not errors and not sampled.errors:
        return _accept_all(batch, sampled, pooled)
    failed = dict(errors)
    kept: list[int] = []
    counts = np.zeros(len(batch.outputs), np.int32)
    for index, row in enumerate(draws.rows):
        begin, end = draws.first[index], draws.first[index + 1]
        drafts = batch.token_ids[batch.offsets[row + 1] - (end - begin - 1) : batch.offsets[row + 1]]
        wrong = np.flatnonzero(sampled.token_ids[begin : end - 1] != drafts)
        end = begin + wrong[0] + 1 if wrong.size else end
        problem = next((sampled.errors[draw] for draw in range(begin, end) if draw in sampled.errors), None)
        if problem is not None:
            failed.setdefault(int(row), problem)
        if int(row) not in failed:
            kept += range(begin, end)
            counts[row] = end - begin
    tops = [slice(sampled.top_offsets[draw], sampled.top_offsets[draw + 1]) for draw in kept]
    return StepResult(
        offsets=_offsets(counts),
        token_ids=sampled.token_ids[kept],
        logprobs=sampled.logprobs[kept],
        top_offsets=_offsets(np.diff(sampled.top_offsets)[kept]),
        top_token_ids=_join((sampled.top_token_ids[top] for top in tops), np.int32),
        top_logprobs=_join((sampled.top_logprobs[top] for top in tops), np.float32),
        pooled={row: vector for row, vector in pooled.items() if row not in failed},
        errors=failed,
    )


def _accept_all(batch: Batch, sampled: SampleResult, pooled: Mapping[int, Float32]) -> StepResult:
    """The same where nothing was drafted and nothing failed: most steps."""
    return StepResult(
        offsets=_offsets(batch.outputs == SAMPLE),
        token_ids=sampled.token_ids,
        logprobs=sampled.logprobs,
        top_offsets=sampled.top_offsets,
        top_token_ids=sampled.top_token_ids,
        top_logprobs=sampled.top_logprobs,
        pooled=pooled,
    )


def _offsets(lengths: NDArray[Any]) -> Int32:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _join(pieces: Iterable[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate((np.empty(0, dtype), *pieces)).astype(dtype, copy=False)

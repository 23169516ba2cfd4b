"""Choosing the next token of each row of logits: the face of csrc/kernels/sampling.cpp.

`millrace.kernels.reference.sampling.sample` is the definition, bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millrace.kernels import _C

Int32 = NDArray[np.int32]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

STATUS = {1: "the logits hold NaN or infinity", 2: "no token is allowed: every logit is masked or -infinity"}


class Mask(Protocol):
    """Tokens row `row` may yield: bit v % 32 of words[v // 32] stands for token v; ceil(V / 32) words."""

    @property
    def row(self) -> int: ...
    @property
    def words(self) -> NDArray[np.uint32]: ...


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Of S rows. Row i reports top_*[top_offsets[i]:top_offsets[i + 1]], most likely first, lowest id on a tie."""

    token_ids: Int32  # [S] -1: the row failed
    logprobs: Float32  # [S] natural logarithms; NaN where not asked for
    top_offsets: Int32  # [S + 1]
    top_token_ids: Int32
    top_logprobs: Float32
    errors: Mapping[int, str]  # row -> why it failed; the others stand


def sample(
    logits: Float32,
    *,
    temperature: Float32,
    top_p: Float32,
    top_k: Int32,
    min_p: Float32,
    presence_penalty: Float32,
    frequency_penalty: Float32,
    repetition_penalty: Float32,
    seed: UInt64,
    choice: Int32,
    position: Int32,
    top_n: Int32,
    bias_offsets: Int32,
    bias_ids: Int32,
    bias_values: Float32,
    history_offsets: Int32,
    history_ids: Int32,
    history_prompt_lens: Int32,
    masks: Sequence[Mask] | None = None,
) -> SampleResult:
    """Draw one token from each row of `logits` [S, V]; rows are contiguous, with any stride between them.

    Each column has S entries; ragged ones give row i the entries offsets[i]:offsets[i + 1] ([S + 1], int32).

    temperature          [0, inf); 0 takes the highest logit, the lowest id on a tie
    top_p                (0, 1]; 1 is off
    top_k                [0, inf); 0 is off
    min_p                [0, 1]; 0 is off
    presence_penalty     finite; 0 is off
    frequency_penalty    finite; 0 is off
    repetition_penalty   (0, inf); 1 is off
    seed, choice, position   what the draw is keyed by; choice and position in [0, 2^31)
    top_n                [-1, inf) most likely tokens to report, at most V; -1 reports no logprobs at all
    bias_*               finite values added to the logits of ids
    history_*            tokens of the prompt (the first history_prompt_lens) and of the output so far
    masks                at most one per row; the caller has waited for them to be ready

    The result of a row depends on that row alone: not on the batch, on threads or on the instruction set.
    A row whose logits hold NaN or +infinity, or leave no token, fails alone. ValueError: a wrong dtype, shape
    or value in the arguments, nothing was drawn. Runs on the calling thread, without the GIL.
    """
    columns: dict[str, NDArray[Any]] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "choice": choice,
        "position": position,
        "top_n": top_n,
        "bias_offsets": bias_offsets,
        "bias_ids": bias_ids,
        "bias_values": bias_values,
        "history_offsets": history_offsets,
        "history_ids": history_ids,
        "history_prompt_lens": history_prompt_lens,
    }
    return sample_result(_C.sample(logits, columns, [(mask.row, mask.words) for mask in masks or ()]))


def sample_result(native: "_C.Sampled") -> SampleResult:
    """What native sampling returns, in words."""
    token_ids, logprobs, top_offsets, top_token_ids, top_logprobs, status = native
    errors = {int(row): STATUS[int(status[row])] for row in np.flatnonzero(status)}
    return SampleResult(token_ids, logprobs, top_offsets, top_token_ids, top_logprobs, errors)

"""The seam between the engine and whatever runs steps of a model.

A step is one `Batch`: rows of tokens, each row a piece of one sequence. The engine submits a batch, gets a
ticket, and collects the result of a ticket once. It may submit the next batch before it has collected the
last one: where an input token is not known yet, the batch says "the token sampled by row r of ticket t".
An executor keeps nothing of a request but its KV blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

Ticket = int


class Output(IntEnum):
    """What a row yields."""

    NOTHING = 0  # a prefill chunk that is not the last
    SAMPLE = 1  # one token, or with drafts one more than are accepted
    POOLED = 2  # one vector


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Input token `index` of a batch is the last token sampled by `row` of `ticket`."""

    index: int
    ticket: Ticket
    row: int


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Parameters of the S rows whose output is SAMPLE, in row order. Ranges: generation.proto.

    Ragged columns give row i the entries offsets[i]:offsets[i + 1]. The history of a row without
    penalties is empty. A history holds what is known when the batch is submitted; the executor appends
    the placeholder tokens of the row itself.
    """

    temperature: Float32
    top_p: Float32
    top_k: Int32
    min_p: Float32
    presence_penalty: Float32
    frequency_penalty: Float32
    repetition_penalty: Float32
    seed: UInt64
    choice: Int32
    position: Int32  # index in the sequence of the (first) token drawn
    top_n: Int32  # most likely tokens to report, -1: no log-probabilities
    bias_offsets: Int32  # [S + 1]
    bias_ids: Int32
    bias_values: Float32
    history_offsets: Int32  # [S + 1]
    history_ids: Int32  # prompt, then output
    history_prompt_lens: Int32  # [S] tokens of the history that belong to the prompt


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Tokens that sample row `row` may yield: bit v of little-endian uint32 words; ready when `is_ready`."""

    row: int
    words: NDArray[np.uint32]
    is_ready: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """R rows, T tokens in all. Row i owns tokens offsets[i]:offsets[i + 1]; its drafts are its last ones."""

    token_ids: Int32  # [T]; -1 where a placeholder or an embedding stands
    positions: Int32  # [T] index in the sequence
    slots: Int32  # [T] where the KV of the token goes: block * block_size + offset
    offsets: Int32  # [R + 1]
    context_lens: Int32  # [R] KV length after this step: the last position + 1
    block_tables: Int32  # [R, widest]; -1 past the end
    outputs: Int32  # [R] of Output
    draft_lens: Int32  # [R]
    adapters: Int32  # [R]; -1: the base model
    sampling: SamplingColumns
    placeholders: Sequence[Placeholder] = ()
    masks: Sequence[TokenMask] = ()
    embeddings: Mapping[int, Float32] = field(default_factory=dict)  # token index -> [hidden]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step yielded. Row i sampled token_ids[offsets[i]:offsets[i + 1]] (often none, often one)."""

    offsets: Int32  # [R + 1]
    token_ids: Int32
    logprobs: Float32  # aligned with token_ids; NaN where not asked for
    top_offsets: Int32  # [len(token_ids) + 1]
    top_token_ids: Int32
    top_logprobs: Float32
    pooled: Mapping[int, Float32] = field(default_factory=dict)  # row -> vector
    errors: Mapping[int, str] = field(default_factory=dict)  # row -> why it yielded nothing; the others stand


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How the executor holds KV: `num_blocks` blocks of `block_size` tokens."""

    block_size: int
    num_blocks: int
    bytes_per_block: int


class Executor(Protocol):
    """Runs steps. One thread calls it (the engine's); only `progress` may be read from others."""

    @property
    def kv_layout(self) -> KVLayout: ...

    @property
    def progress(self) -> int:
        """A counter that grows with every layer completed."""

    def submit(self, batch: Batch) -> Ticket:
        """Start a step. Placeholders must name tickets submitted before; the batch must not change until collected."""

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for a step and return its result. Each ticket once, in the order of submission."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, target), after all submitted steps and before those to come."""

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Return the contents of KV blocks, in order; only an executor of equal layout can import them."""

    def import_blocks(self, blocks: Sequence[int], data: bytes) -> None:
        """Overwrite KV blocks with what `export_blocks` returned. ValueError if the size does not fit."""

    def load_adapter(self, path: str) -> int:
        """Load a LoRA adapter and return its number. FeatureUnsupported where there is no such thing."""

    def close(self) -> None:
        """Release memory. Idempotent."""

"""Packs planned rows into the arrays of a `Batch`.

What a step needs of a running sequence lies in columns, one lane each: its tokens, its blocks, its sampling
parameters. They change by what is new (an arrival, a token, a block), and native loops gather them into the
arrays of a step, so a step costs its own tokens and not those of the contexts behind them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.kernels.ragged import append, gather, pack_tokens
from millrace.server.engine import loops
from millrace.server.engine.row import Row
from millrace.server.engine.sequence import Sequence
from millrace.server.model.executors.base import (
    Batch,
    Float32,
    Int32,
    Output,
    Placeholder,
    SamplingColumns,
    Ticket,
    TokenMask,
)

Rows = list[Row]
SAMPLE, NOTHING = np.int32(Output.SAMPLE), np.int32(Output.NOTHING)
UInt32 = NDArray[np.uint32]


def all_but(banned: Iterable[int], vocab_size: int) -> UInt32:
    """The words of a TokenMask that allows every token but `banned`."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    allowed[:vocab_size] = True
    allowed[list(banned)] = False
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)


class RaggedTable:
    """Rows of different lengths, [rows, width], that grow in width by doubling."""

    def __init__(self, rows: int, dtype: type[np.generic]):
        self.values: NDArray[Any] = np.zeros((rows, 16), dtype)
        self.lens = np.zeros(rows, np.int32)

    def set(self, row: int, values: Any) -> None:
        """Replace a row."""
        self.reserve(len(values))
        self.values[row, : len(values)] = values
        self.lens[row] = len(values)

    def append(self, rows: Int32, values: Int32) -> None:
        """Add one value to each of the rows."""
        self.reserve(int(self.lens[rows].max(initial=0)) + 1)
        append(self.values, self.lens, rows, values)

    def reserve(self, width: int) -> None:
        """Make room for rows of `width`."""
        old = self.values.shape[1]
        if width > old:
            grown = np.zeros((len(self.lens), max(width, 2 * old)), self.values.dtype)
            for row, length in enumerate(self.lens):  # untouched pages stay unmapped
                grown[row, :length] = self.values[row, :length]
            self.values = grown


class BatchPacker:
    """The columns of the running sequences, [lanes]. Lanes are those of the scheduler."""

    def __init__(self, lanes: int, block_size: int, vocab_size: int):
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._tokens = RaggedTable(lanes, np.int32)  # prompt, then output
        self._blocks = RaggedTable(lanes, np.int32)
        self._bias_ids = RaggedTable(lanes, np.int32)
        self._bias_values = RaggedTable(lanes, np.float32)
        self._reals = np.zeros((6, lanes), np.float32)
        self._integers = np.zeros((3, lanes), np.int32)
        self._seeds = np.zeros(lanes, np.uint64)
        self._prompt_lens = np.zeros(lanes, np.int32)
        self._needs_history = np.zeros(lanes, np.bool_)
        self._first_stops = np.zeros(lanes, np.int32)  # position of the first token that may be a stop token
        self._without_stops: dict[int, UInt32] = {}  # lane -> mask for the tokens before

    def admit(self, sequence: Sequence) -> None:
        """Fill the lane of a sequence that starts, or starts over."""
        request, lane = sequence.request, sequence.lane
        s = request.sampling
        self._tokens.set(
            lane, np.concatenate((np.asarray(request.prompt_ids, np.int32), np.array(sequence.output, np.int32)))
        )
        self._blocks.set(lane, sequence.blocks)
        self._reals[:, lane] = (
            s.temperature, s.top_p, s.min_p, s.presence_penalty, s.frequency_penalty, s.repetition_penalty
        )  # fmt: skip
        top_n = -1 if request.logprobs_top_n is None else request.logprobs_top_n
        self._integers[:, lane] = s.top_k, request.choice, top_n
        self._seeds[lane] = s.seed
        self._prompt_lens[lane] = sequence.prompt_len
        self._needs_history[lane] = sequence.needs_history
        self._bias_ids.set(lane, list(s.logit_bias.keys()))
        self._bias_values.set(lane, list(s.logit_bias.values()))
        self._first_stops[lane] = sequence.prompt_len + request.min_output_tokens
        if request.min_output_tokens:
            # A mask, not a bias: no finite bias rules a token out, and a request may bias the same token.
            self._without_stops[lane] = all_but(request.stop_token_ids, self._vocab_size)

    def grow(self, sequence: Sequence) -> None:
        """Take over the newest block of a running sequence."""
        self._blocks.append(np.array([sequence.lane], np.int32), np.array(sequence.blocks[-1:], np.int32))

    def append(self, lanes: Int32, tokens: Int32) -> None:
        """Add one sampled token to each of the lanes."""
        self._tokens.append(lanes, tokens)

    def pack(self, rows: Rows, tickets: Mapping[int, Ticket]) -> Batch:
        """The batch of rows of running sequences; `tickets` names the steps in flight by number."""
        lanes, starts, ends, samples, sources = loops.columns(rows)
        self._tokens.reserve(int(ends.max()))  # placeholders lie behind the known tokens
        token_ids, positions, slots, offsets, block_tables = pack_tokens(
            lanes, starts, ends, self._tokens.values, self._blocks.values, self._block_size
        )
        placeholders = [
            Placeholder(int(offsets[row + 1]) - 1, tickets[source[0]], source[1]) for row, source in sources
        ]
        token_ids[[p.index for p in placeholders]] = -1
        drawing, drawn = lanes[samples], ends[samples]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            offsets=offsets,
            context_lens=ends,
            block_tables=block_tables,
            outputs=np.where(samples, SAMPLE, NOTHING),
            draft_lens=np.zeros(len(rows), np.int32),
            adapters=np.full(len(rows), -1, np.int32),
            sampling=self._sampling(drawing, drawn),
            placeholders=placeholders,
            masks=[
                TokenMask(i, self._without_stops[int(drawing[i])])
                for i in np.flatnonzero(drawn < self._first_stops[drawing]).tolist()
            ],
        )

    def _sampling(self, lanes: Int32, positions: Int32) -> SamplingColumns:
        """Parameters of the rows that draw the token at `positions`."""
        temperature, top_p, min_p, presence, frequency, repetition = self._reals.take(lanes, axis=1)
        top_k, choice, top_n = self._integers.take(lanes, axis=1)
        bias_lens = self._bias_ids.lens[lanes]
        bias_offsets, bias_ids = gather(self._bias_ids.values, lanes, bias_lens)
        bias_values: Float32 = gather(self._bias_values.values, lanes, bias_lens)[1]
        # A token still being sampled is not in the lane yet: the executor appends it.
        history_lens = np.where(self._needs_history[lanes], self._tokens.lens[lanes], np.int32(0))
        history_offsets, history_ids = gather(self._tokens.values, lanes, history_lens)
        return SamplingColumns(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            seed=self._seeds[lanes],
            choice=choice,
            position=positions,
            top_n=top_n,
            bias_offsets=bias_offsets,
            bias_ids=bias_ids,
            bias_values=bias_values,
            history_offsets=history_offsets,
            history_ids=history_ids,
            history_prompt_lens=np.minimum(self._prompt_lens[lanes], history_lens),
        )

"""The executor of CPUs: the native runtime in csrc/runtime. No PyTorch anywhere in it.

A step is computed inside `submit`, by the threads of one pool that all models of the process share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache

import numpy as np

from millrace.kernels import _C
from millrace.kernels.sampling import sample_result
from millrace.server.errors import FeatureUnsupported
from millrace.server.model.executors.base import (
    Batch,
    Float32,
    Int32,
    KVLayout,
    Output,
    SamplingColumns,
    StepResult,
    Ticket,
)
from millrace.server.model.executors.cpu_weights import Loader, packed_bytes, stored_bytes
from millrace.server.model.executors.draws import NO_DRAWS, Draws, accept_draws, plan_draws
from millrace.server.model.executors.precision import Precision
from millrace.server.model.executors.texts import check_texts
from millrace.server.model.executors.tickets import Tickets, check_runnable, checked_vectors
from millrace.server.model.spec import ModelSpec
from millrace.server.model.weights import Found, Progress

POOLED = int(Output.POOLED)  # comparing arrays with members of an enum is slow
COLUMNS = tuple(field.name for field in fields(SamplingColumns))
NO_EMBEDDINGS = np.empty(0, np.int32), np.empty((0, 0), np.float32)


@cache
def thread_pool(threads: int | None, first_core: int) -> _C.Pool:
    """One for all models of the process: their steps take turns. None: a thread for each core from the first on."""
    return _C.Pool(threads or max(_C.available_cores() - first_core, 1), first_core)


class CpuExecutor:
    """Implements `Executor`."""

    def __init__(
        self,
        spec: ModelSpec,
        found: Sequence[Found],
        precision: Precision,
        layout: KVLayout,
        pool: _C.Pool,
        progress: Progress,
    ):
        """Raises CheckpointError, and MemoryError where the system has not the memory that was planned."""
        weights = _C.Weights(packed_bytes(spec, precision, stored_bytes(found)), pool)
        network = Loader(found, weights, progress).network(spec, precision)
        self.spec = spec
        self._model: _C.Model | None = _C.Model(network, weights, precision.kv, layout.num_blocks, pool)
        self._layout = layout
        self._tickets = Tickets()

    @property
    def kv_layout(self) -> KVLayout:
        return self._layout

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        return self._running.weight_bytes

    @property
    def progress(self) -> int:
        return 0 if self._model is None else self._model.progress

    def submit(self, batch: Batch) -> Ticket:
        token_ids, errors = self._tickets.fill_placeholders(batch)
        check_runnable(batch)
        if not self.spec.causal:
            check_texts(batch, self.spec.context)
        draws = plan_draws(batch, token_ids)
        if not len(batch.outputs):
            return self._tickets.keep(accept_draws(batch, draws, NO_DRAWS, {}, errors))
        rows = np.flatnonzero(batch.outputs == POOLED).astype(np.int32)
        native, vectors = self._step(batch, token_ids, draws, rows)
        pooled = checked_vectors(rows.tolist(), vectors, errors)
        return self._tickets.keep(accept_draws(batch, draws, sample_result(native), pooled, errors))

    def _step(self, batch: Batch, token_ids: Int32, draws: Draws, pooled: Int32) -> "tuple[_C.Sampled, Float32]":
        columns = {name: getattr(draws.sampling, name) for name in COLUMNS}
        return self._running.step(
            token_ids, batch.positions, batch.slots, batch.offsets, batch.context_lens, batch.block_tables,
            draws.tokens, pooled, _embeddings(batch.embeddings), columns, [(m.row, m.words) for m in draws.masks],
        )  # fmt: skip

    @property
    def logits(self) -> Float32:
        """Of the tokens that the last step drew after, [draws, vocabulary], before penalties and masks."""
        return self._running.logits()

    def collect(self, ticket: Ticket) -> StepResult:
        return self._tickets.take(ticket)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._running.copy_blocks(pairs)

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Block after block, in each layer after layer: keys, values, scales."""
        return self._running.export_blocks(blocks)

    def import_blocks(self, blocks: Sequence[int], data: bytes) -> None:
        self._running.import_blocks(blocks, data)

    def load_adapter(self, path: str) -> int:
        raise FeatureUnsupported("the cpu executor runs no adapters")

    def close(self) -> None:
        self._model = None
        self._tickets.close()

    @property
    def _running(self) -> _C.Model:
        if self._model is None:
            raise ValueError("the executor is closed")
        return self._model


def _embeddings(embeddings: Mapping[int, Float32]) -> tuple[Int32, Float32]:
    """Indices [E] and vectors [E, hidden] of tokens that come as embeddings."""
    if not embeddings:
        return NO_EMBEDDINGS
    return np.fromiter(embeddings, np.int32), np.ascontiguousarray(np.stack(list(embeddings.values())), np.float32)

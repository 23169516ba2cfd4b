"""The executor that defines the others: float32 PyTorch, clear before fast, steps run when they are submitted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.sampling import SampleResult, sample
from millrace.server.errors import FeatureUnsupported
from millrace.server.model.executors.base import Batch, Float32, KVLayout, Output, StepResult, Ticket
from millrace.server.model.executors.draws import NO_DRAWS, Draws, accept_draws, plan_draws
from millrace.server.model.executors.reference_model import ReferenceModel
from millrace.server.model.executors.texts import check_texts
from millrace.server.model.executors.tickets import Tickets, check_runnable, checked_vectors
from millrace.server.model.spec import ModelSpec, Weight


class ReferenceExecutor:
    """Implements `Executor`. A step is computed inside `submit`; its result waits until it is collected."""

    def __init__(self, spec: ModelSpec, weights: Iterable[tuple[Weight, Float32]], layout: KVLayout):
        self.model = ReferenceModel(spec, weights, layout)
        self._layout = layout
        self._tickets = Tickets()

    @property
    def kv_layout(self) -> KVLayout:
        return self._layout

    @property
    def progress(self) -> int:
        return self.model.progress

    @torch.inference_mode()
    def submit(self, batch: Batch) -> Ticket:
        token_ids, errors = self._tickets.fill_placeholders(batch)
        check_runnable(batch)
        if not self.model.spec.causal:
            check_texts(batch, self.model.spec.context)
        hidden = self.model.forward(batch, torch.from_numpy(token_ids).long().clamp(min=0))
        pooled = self._pool(batch, hidden, errors)
        draws = plan_draws(batch, token_ids)
        sampled = self._draw(draws, hidden) if len(draws.tokens) else NO_DRAWS
        result = accept_draws(batch, draws, sampled, pooled, errors)
        return self._tickets.keep(result)

    def collect(self, ticket: Ticket) -> StepResult:
        return self._tickets.take(ticket)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            for blocks in self._blocks():
                blocks[:, target] = blocks[:, source]

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Block after block, in each layer after layer: keys, then values."""
        index = torch.tensor(blocks, dtype=torch.int64)
        parts = [layer[:, index].transpose(0, 1).reshape(len(index), -1) for layer in self._blocks()]
        return torch.cat(parts, 1).numpy().tobytes()

    def import_blocks(self, blocks: Sequence[int], data: bytes) -> None:
        expected = len(blocks) * self._layout.bytes_per_block
        if len(data) != expected:
            raise ValueError(f"{len(blocks)} blocks take {expected} bytes, not {len(data)}")
        index = torch.tensor(blocks, dtype=torch.int64)
        values = torch.from_numpy(np.frombuffer(data, np.float32).reshape(len(blocks), -1).copy())
        begin = 0
        for layer in self._blocks():
            end = begin + layer[:, 0].numel()
            layer[:, index] = values[:, begin:end].reshape(len(blocks), 2, *layer.shape[2:]).transpose(0, 1)
            begin = end

    def load_adapter(self, path: str) -> int:
        raise FeatureUnsupported("the reference executor runs no adapters")

    def close(self) -> None:
        self.model.release()
        self._tickets.close()

    def _blocks(self) -> Iterable[Tensor]:
        """Each layer's cache as [2, blocks, block size, kv heads, head dim]."""
        size = self._layout.block_size
        return (cache.view(2, -1, size, *cache.shape[2:]) for cache in self.model.cache)

    def _pool(self, batch: Batch, hidden: Tensor, errors: dict[int, str]) -> Mapping[int, Float32]:
        """One vector of each POOLED row; rows with a NaN go to `errors`."""
        rows = np.flatnonzero(batch.outputs == Output.POOLED).tolist()
        spans = [slice(*batch.offsets[row : row + 2].tolist()) for row in rows]
        return checked_vectors(rows, [self.model.pool(hidden[span]).numpy() for span in spans], errors)

    def _draw(self, draws: Draws, hidden: Tensor) -> SampleResult:
        logits = self.model.logits(hidden[torch.from_numpy(draws.tokens).long()])
        columns = {field.name: getattr(draws.sampling, field.name) for field in fields(draws.sampling)}
        return sample(logits.numpy(), **columns, masks=draws.masks)

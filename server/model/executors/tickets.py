"""Results that wait to be collected, and the placeholders that later batches fill from them."""

from collections.abc import Iterable, Mapping

import numpy as np

from millrace.server.model.executors.base import Batch, Float32, Int32, StepResult, Ticket


class Tickets:
    """Of an executor that computes a step when it is submitted."""

    def __init__(self) -> None:
        self._results: dict[Ticket, StepResult] = {}
        self._last: Ticket = 0
        self._closed = False

    def keep(self, result: StepResult) -> Ticket:
        self._last += 1
        self._results[self._last] = result
        return self._last

    def take(self, ticket: Ticket) -> StepResult:
        """ValueError unless it is the oldest."""
        if ticket != next(iter(self._results), None):
            raise ValueError(f"ticket {ticket} is not the oldest one to collect")
        return self._results.pop(ticket)

    def close(self) -> None:
        """Drop what waits; ValueError for batches to come."""
        self._results.clear()
        self._closed = True

    def fill_placeholders(self, batch: Batch) -> tuple[Int32, dict[int, str]]:
        """Token ids with every placeholder filled in, and the rows that cannot go on."""
        if self._closed:
            raise ValueError("the executor is closed")
        token_ids, errors = batch.token_ids.copy(), {}
        for placeholder in batch.placeholders:
            result = self._results.get(placeholder.ticket)
            if result is None:
                raise ValueError(f"a placeholder names ticket {placeholder.ticket}, which does not wait")
            begin, end = result.offsets[placeholder.row : placeholder.row + 2]
            if begin < end:
                token_ids[placeholder.index] = result.token_ids[end - 1]
            else:
                token_ids[placeholder.index] = 0  # any token: the row's result is dropped
                row = int(np.searchsorted(batch.offsets, placeholder.index, "right")) - 1
                errors[row] = result.errors.get(placeholder.row, "the row that it continues sampled nothing")
        return token_ids, errors


def check_runnable(batch: Batch) -> None:
    """Raise ValueError for what no executor that draws at submission can run."""
    if (batch.adapters >= 0).any():
        raise ValueError("a row names an adapter; none was loaded")
    if not all(mask.is_ready for mask in batch.masks):
        raise ValueError("a token mask is not ready; this executor draws at submission")


def checked_vectors(rows: Iterable[int], vectors: Iterable[Float32], errors: dict[int, str]) -> Mapping[int, Float32]:
    """The vectors of POOLED rows; those that are not finite go to `errors`."""
    pooled = {}
    for row, vector in zip(rows, vectors, strict=True):
        if np.isfinite(vector).all():
            pooled[int(row)] = vector
        else:
            errors.setdefault(int(row), "the model computed a hidden state that is not finite")
    return pooled

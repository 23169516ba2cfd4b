"""Exact search: every vector is compared. The oracle of every other index, and the fastest of them while small."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millrace.retrieval import snapshot
from millrace.retrieval.index.base import Float32, Labels, Neighbours
from millrace.retrieval.index.checks import (
    MAX_DIMENSIONS,
    check_allowed,
    check_labels,
    check_range,
    check_search,
    unit_query,
    unit_rows,
)
from millrace.retrieval.index.lock import ReadWriteLock
from millrace.server.errors import IndexDamaged

Rows = NDArray[np.int64]

# Above this share of the rows, scoring all of them in place is cheaper than gathering those that are allowed.
GATHER_SHARE = 0.5
GATHER_ROWS = 256
# How far a float32 dot product of unit vectors strays from the true one, with room to spare.
ROUNDING = 1e-5


class FlatIndex:
    """Rows of unit vectors in one matrix that grows by doubling; a removed row is filled by the last one.

    Results do not depend on the order of the rows: candidates come from a float32 product, whose last bits do,
    and are then scored in float64, row by row. Equal scores are ordered by label.
    """

    kind = "flat"

    def __init__(self, dimensions: int):
        check_range("dimensions", dimensions, 1, MAX_DIMENSIONS)
        self.dimensions = dimensions
        self._lock = ReadWriteLock()
        self._vectors: Float32 = np.empty((0, dimensions), np.float32)
        self._labels: Labels = np.empty(0, np.uint64)
        self._rows: dict[int, int] = {}  # label -> row

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> Labels:
        with self._lock.read():
            return np.sort(self._labels[: len(self)])

    def known(self, labels: Labels) -> Labels:
        """Those of `labels` that are there, in their order."""
        with self._lock.read():
            return self._labels[self._rows_of(labels)]

    def vectors(self, labels: Labels) -> Float32:
        """[n, dimensions], unit length, of those labels that are there, in their order."""
        with self._lock.read():
            return self._vectors[self._rows_of(labels)]

    def add(self, labels: Sequence[int] | Labels, vectors: Float32) -> None:
        units, numbers = unit_rows(vectors, self.dimensions), check_labels(labels)
        if len(units) != len(numbers):
            raise ValueError(f"{len(numbers)} labels for {len(units)} vectors")
        self._reserve(len(self) + len(numbers))
        with self._lock.write():
            rows = [self._rows.setdefault(label, len(self._rows)) for label in numbers.tolist()]
            self._labels[rows] = numbers
            self._vectors[rows] = units

    def remove(self, labels: Sequence[int] | Labels) -> None:
        numbers = check_labels(labels)
        with self._lock.write():
            for label in numbers.tolist():
                row = self._rows.pop(label, None)
                last = len(self._rows)
                if row is not None and row != last:
                    self._vectors[row], self._labels[row] = self._vectors[last], self._labels[last]
                    self._rows[int(self._labels[row])] = row

    def search(
        self,
        query: Float32,
        k: int,
        *,
        allowed: Labels | None = None,
        ef_search: int | None = None,
        exact: bool = False,
    ) -> Neighbours:
        check_search(k, ef_search)
        unit = unit_query(query, self.dimensions)
        narrow = unit.astype(np.float32)
        with self._lock.read():
            if allowed is None:
                rows = np.arange(len(self))
                scores = self._vectors[: len(self)] @ narrow
            else:
                rows = self._rows_of(check_allowed(allowed))
                if len(rows) > GATHER_SHARE * len(self):
                    scores = (self._vectors[: len(self)] @ narrow)[rows]
                else:
                    scores = self._gathered(rows, narrow)
            return self._rank(rows[_candidates(scores, k)], unit, k)

    def rank(self, query: Float32, labels: Labels, k: int) -> Neighbours:
        """The k nearest to query among `labels`, each given once; those that are not there are left out."""
        unit = unit_query(query, self.dimensions)
        with self._lock.read():
            return self._rank(self._rows_of(labels), unit, k)

    def save(self, path: Path, model: str) -> None:
        with self._lock.read():
            count = len(self)
            envelope = snapshot.Envelope(self.kind, self.dimensions, count, model)
            snapshot.write(path, envelope, [self._labels[:count].data, self._vectors[:count].data])

    def load(self, path: Path, model: str) -> None:
        with snapshot.read(path, self.dimensions, model) as image:
            self.restore(image)

    def restore(self, image: snapshot.Image) -> None:
        """Replace the contents by an image that has been verified."""
        count = image.envelope.count
        if image.envelope.kind != self.kind or image.size != count * (8 + 4 * self.dimensions):
            raise IndexDamaged("the image is none of a flat index")
        labels = np.frombuffer(image.payload.read(8 * count), "<u8").astype(np.uint64)
        vectors = np.frombuffer(image.payload.read(), "<f4").astype(np.float32)
        self.replace(labels, vectors.reshape(count, self.dimensions))

    def replace(self, labels: Labels, units: Float32) -> None:
        """Take over these arrays, unit vectors [n, dimensions] and their labels, as the contents."""
        rows = {label: row for row, label in enumerate(labels.tolist())}
        with self._lock.write():
            self._labels, self._vectors, self._rows = labels, units, rows

    def _reserve(self, count: int) -> None:
        """Copies beside searches; the writer alone changes what is copied."""
        if count <= len(self._labels):
            return
        capacity = max(count, 2 * len(self._labels))
        labels, vectors = np.empty(capacity, np.uint64), np.empty((capacity, self.dimensions), np.float32)
        labels[: len(self)], vectors[: len(self)] = self._labels[: len(self)], self._vectors[: len(self)]
        with self._lock.write():
            self._labels, self._vectors = labels, vectors

    def _rows_of(self, labels: Labels) -> Rows:
        row_of = self._rows.get
        rows = np.fromiter((row_of(label, -1) for label in labels.tolist()), np.int64, len(labels))
        return rows[rows >= 0]

    def _gathered(self, rows: Rows, query: Float32) -> Float32:
        """A block at a time: one large copy would cost more in page faults than all the rest."""
        scores = np.empty(len(rows), np.float32)
        block = np.empty((min(len(rows), GATHER_ROWS), self.dimensions), np.float32)
        for start in range(0, len(rows), GATHER_ROWS):
            some = rows[start : start + GATHER_ROWS]
            part = block[: len(some)]
            np.take(self._vectors, some, axis=0, out=part, mode="clip")  # not "raise": that copies twice
            np.matmul(part, query, out=scores[start : start + GATHER_ROWS])
        return scores

    def _rank(self, rows: Rows, unit: NDArray[np.float64], k: int) -> Neighbours:
        # Summed row by row: a matrix product may round the same vector differently in another row.
        blocks = (self._vectors[rows[start : start + GATHER_ROWS]] for start in range(0, len(rows), GATHER_ROWS))
        sums = [np.multiply(block, unit).sum(axis=1) for block in blocks]
        scores = np.concatenate([np.empty(0), *sums]).clip(-1, 1).astype(np.float32)
        labels = self._labels[rows]
        order = np.lexsort((labels, -scores))[:k]
        return Neighbours(labels[order], scores[order])


def _candidates(scores: Float32, k: int) -> Rows:
    """Where the k best scores are, and all that rounding may have put just below them."""
    if len(scores) <= k:
        return np.arange(len(scores))
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero(scores >= kth - ROUNDING)

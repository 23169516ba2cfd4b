"""The seam between retrieval and whatever finds nearest neighbours."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Labels = NDArray[np.uint64]


class Neighbours(NamedTuple):
    """Nearest first; fewer than asked for where fewer exist or are allowed."""

    labels: Labels  # [k]
    scores: Float32  # [k] cosine similarity


class VectorIndex(Protocol):
    """Vectors by label, compared by cosine similarity. Vectors are normalised by the index.

    A label is a number in [0, 2^63). One writer (add, remove, save, load) at a time; searches may run in other
    threads beside it, and never return a label that is not there or not allowed, nor another's score. Every method
    that takes vectors raises InvalidVector at a wrong dimension, a NaN or infinity, or a vector of zeros, and then
    changes nothing.
    """

    @property
    def dimensions(self) -> int: ...

    def __len__(self) -> int: ...

    def labels(self) -> Labels:
        """Every label, ascending."""

    def add(self, labels: Sequence[int] | Labels, vectors: Float32) -> None:
        """Add [n, dimensions]; a label that is there already is replaced."""

    def remove(self, labels: Sequence[int] | Labels) -> None:
        """Labels that are not there are ignored."""

    def search(
        self,
        query: Float32,
        k: int,
        *,
        allowed: Labels | None = None,
        ef_search: int | None = None,
        exact: bool = False,
    ) -> Neighbours:
        """The k in [1, 1000] nearest to query [dimensions] among `allowed` (ascending, each once; None: all).

        Equal scores are ordered by label. `ef_search`, in [1, 2048], widens an approximate search; `exact` asks for
        the true neighbours, at the cost of time. Raises InvalidRequest out of these ranges.
        """

    def save(self, path: Path, model: str) -> None:
        """Write an image: whole or not at all (OSError). `model` is the digest of what made the vectors."""

    def load(self, path: Path, model: str) -> None:
        """Replace the contents by an image. Raises IndexDamaged, and changes nothing, unless it is whole and of
        this dimension and model.
        """

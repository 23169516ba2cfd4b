"""Exact while that is fast, a graph when there are many vectors."""

from collections.abc import Sequence
from pathlib import Path

from millrace.retrieval import snapshot
from millrace.retrieval.index.base import Float32, Labels, Neighbours
from millrace.retrieval.index.flat import FlatIndex
from millrace.retrieval.index.hnsw import HnswIndex
from millrace.server.errors import IndexDamaged

# Both take as long at about 5,000 vectors of 384 dimensions; at 10,000 an exact search takes 0.8 ms, the graph a third
# of that, three seconds to build and 0.2 to 0.5 % of the neighbours (bench/index.py).
FLAT_UNTIL = 10_000


class AutoIndex:
    """Becomes a graph above `flat_until` vectors, and flat again below half of that.

    Either change happens in the writer; becoming a graph takes it some seconds, while searches go on.
    """

    def __init__(self, dimensions: int, *, flat_until: int = FLAT_UNTIL):
        self.dimensions = dimensions
        self._flat_until = flat_until
        self._index: FlatIndex | HnswIndex = FlatIndex(dimensions)

    @property
    def kind(self) -> str:
        """ "flat" or "hnsw"."""
        return self._index.kind

    def __len__(self) -> int:
        return len(self._index)

    def labels(self) -> Labels:
        return self._index.labels()

    def add(self, labels: Sequence[int] | Labels, vectors: Float32) -> None:
        self._index.add(labels, vectors)
        self._choose()

    def remove(self, labels: Sequence[int] | Labels) -> None:
        self._index.remove(labels)
        self._choose()

    def search(
        self,
        query: Float32,
        k: int,
        *,
        allowed: Labels | None = None,
        ef_search: int | None = None,
        exact: bool = False,
    ) -> Neighbours:
        return self._index.search(query, k, allowed=allowed, ef_search=ef_search, exact=exact)

    def save(self, path: Path, model: str) -> None:
        self._index.save(path, model)

    def load(self, path: Path, model: str) -> None:
        """An image of either kind."""
        kinds: dict[str, type[FlatIndex] | type[HnswIndex]] = {kind.kind: kind for kind in (FlatIndex, HnswIndex)}
        with snapshot.read(path, self.dimensions, model) as image:
            if image.envelope.kind not in kinds:
                raise IndexDamaged(f"{path}: an index of the kind {image.envelope.kind!r} is unknown")
            index = kinds[image.envelope.kind](self.dimensions)
            index.restore(image)
        self._index = index
        self._choose()

    def _choose(self) -> None:
        match self._index:
            case FlatIndex() if len(self) > self._flat_until:
                self._index = HnswIndex(self.dimensions, store=self._index)
            case HnswIndex() if len(self) < self._flat_until / 2:
                self._index = self._index.store

"""Approximate search through a graph, with the exact index beside it as its store and its way out.

The store keeps every vector a second time (4 bytes per dimension). For that, every score is exact, filters and
small sets are searched without error, the graph can be rebuilt at any time, and what the graph finds is
believed only if the store still has it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from millrace.retrieval import snapshot
from millrace.retrieval.index.base import Float32, Labels, Neighbours
from millrace.retrieval.index.checks import (
    MAX_EF,
    check_allowed,
    check_labels,
    check_range,
    check_search,
    contains,
    unit_query,
)
from millrace.retrieval.index.flat import FlatIndex
from millrace.retrieval.index.graph import Graph, GraphSettings
from millrace.server.errors import IndexDamaged

MAX_WEAR = 0.25
# A candidate of the graph costs as much as this many rows of an exact search (bench/index.py).
ROWS_PER_CANDIDATE = 10
# More of the k nearest are found if the search looks at more than k.
SPARE = 2


class HnswIndex:
    """`m`, `ef_construction`: of new graphs; one that is loaded keeps its own. `store`: what to begin with."""

    kind = "hnsw"

    def __init__(
        self,
        dimensions: int,
        *,
        m: int = 16,
        ef_construction: int = 200,
        ef_search: int = 100,
        store: FlatIndex | None = None,
    ):
        check_range("ef_search", ef_search, 1, MAX_EF)
        self.dimensions = dimensions
        self.ef_search = ef_search
        self._settings = GraphSettings(m, ef_construction)
        store = store or FlatIndex(dimensions)
        self._parts = store, self._built_over(store)

    @property
    def store(self) -> FlatIndex:
        return self._parts[0]

    def __len__(self) -> int:
        return len(self.store)

    def labels(self) -> Labels:
        return self.store.labels()

    def add(self, labels: Sequence[int] | Labels, vectors: Float32) -> None:
        store, graph = self._parts
        numbers = np.unique(check_labels(labels))
        replaced = store.known(numbers)
        before = store.vectors(replaced)
        store.add(labels, vectors)
        graph.remove(replaced, before)
        graph.add(numbers, store.vectors(numbers))
        self._rebuild_if_worn()

    def remove(self, labels: Sequence[int] | Labels) -> None:
        """May take as long as building the index; searches go on."""
        store, graph = self._parts
        numbers = store.known(np.unique(check_labels(labels)))
        graph.remove(numbers, store.vectors(numbers))
        store.remove(numbers)
        self._rebuild_if_worn()

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
        store, graph = self._parts
        eligible = len(store) if allowed is None else len(check_allowed(allowed))
        wanted = max(ef_search or self.ef_search, SPARE * k)
        width = math.ceil(wanted * max(1.0, len(store) / max(1, eligible)))
        if not exact and eligible > ROWS_PER_CANDIDATE * width:
            candidates = graph.search(unit_query(query, self.dimensions).astype(np.float32), width)
            if candidates is not None:
                if allowed is not None:
                    candidates = candidates[contains(allowed, candidates)]
                found = store.rank(query, candidates, k)
                if len(found.labels) == k:
                    return found
        return store.search(query, k, allowed=allowed)

    def save(self, path: Path, model: str) -> None:
        store, graph = self._parts
        with snapshot.memory_file() as file:
            image = graph.save(file)
            snapshot.write(path, snapshot.Envelope(self.kind, self.dimensions, len(store), model), image)

    def load(self, path: Path, model: str) -> None:
        with snapshot.read(path, self.dimensions, model) as image:
            self.restore(image)

    def restore(self, image: snapshot.Image) -> None:
        """Replace the contents by an image that has been verified."""
        if image.envelope.kind != self.kind:
            raise IndexDamaged("the image is none of an hnsw index")
        graph, labels, units = Graph.load(image.payload, self.dimensions, image.envelope.count)
        store = FlatIndex(self.dimensions)
        store.replace(labels, units)
        self._parts = store, graph

    def _built_over(self, store: FlatIndex) -> Graph:
        graph, labels = Graph(self.dimensions, self._settings), store.labels()
        graph.add(labels, store.vectors(labels))
        return graph

    def _rebuild_if_worn(self) -> None:
        store, graph = self._parts
        if graph.wear > MAX_WEAR:
            self._parts = store, self._built_over(store)

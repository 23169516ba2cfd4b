"""hnswlib behind the few verbs that are safe, with its traps closed.

- It reads links without locks while it searches, so that an insertion that raises the top layer could crash a
  search beside it: every change waits for the searches inside, and holds up those that come.
- Its search width belongs to the index, not to the query, and is lost by a load: it stays at 1 here, and a
  wider search asks for more results.
- It raises if fewer results can be reached than were asked for; only an exact search helps then.
- Its capacity is fixed, its count includes the deleted, and deleting twice is an error.
- It saves without an error on a full disk, and crashes on damaged files: see `snapshot.py`.
"""

import errno
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import hnswlib
import numpy as np
from numpy.typing import NDArray

from millrace.retrieval.index.base import Float32, Labels
from millrace.retrieval.index.checks import MAX_EF, check_range
from millrace.retrieval.index.lock import ReadWriteLock
from millrace.retrieval.snapshot import path_of
from millrace.server.errors import IndexDamaged

MIN_CAPACITY = 1024
# What an image begins with: offset of layer 0, capacity, nodes, bytes per node, offset of the label and of the vector
# in a node, top layer, entry point, links per layer, in layer 0, M, level multiplier, ef_construction.
HEADER = struct.Struct("<6QiI3QdQ")
DELETED = 1  # in the third byte of a node


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """`m`: links per node and layer, twice as many in layer 0. `ef_construction`: candidates of an insertion."""

    m: int
    ef_construction: int

    def __post_init__(self) -> None:
        check_range("m", self.m, 4, 64)
        check_range("ef_construction", self.ef_construction, 1, MAX_EF)


class Graph:
    """Unit vectors, linked to their neighbours. One writer; searches may run beside it."""

    def __init__(self, dimensions: int, settings: GraphSettings):
        index = hnswlib.Index("ip", dimensions)
        index.init_index(MIN_CAPACITY, M=settings.m, ef_construction=settings.ef_construction)
        self._hold(index, set())

    def _hold(self, index: Any, deleted: set[int]) -> None:
        index.set_num_threads(1)  # by default it takes every core
        index.set_ef(1)
        self._index, self._deleted = index, deleted
        self._updates = 0
        self._lock = ReadWriteLock()

    def __len__(self) -> int:
        """Nodes that a search can return."""
        return int(self._index.element_count) - len(self._deleted)

    @property
    def wear(self) -> float:
        """The share of nodes that were deleted or moved. Recall falls as it grows."""
        return (len(self._deleted) + self._updates) / max(1, int(self._index.element_count))

    def add(self, labels: Labels, units: Float32) -> None:
        """A label that is there, or was, moves to its new vector."""
        for label, unit in zip(labels.tolist(), units, strict=True):
            with self._lock.write():  # for one insertion: about a millisecond
                nodes = self._index.element_count
                if nodes == self._index.max_elements:
                    self._index.resize_index(2 * nodes)
                self._index.add_items(unit, label)
                self._deleted.discard(label)
                self._updates += self._index.element_count == nodes

    def remove(self, labels: Labels) -> None:
        """Each must be there."""
        with self._lock.write():
            for label in labels.tolist():
                self._index.mark_deleted(label)
                self._deleted.add(label)

    def search(self, unit: Float32, width: int) -> Labels | None:
        """About the `width` nearest; None: the graph cannot reach so many."""
        try:
            with self._lock.read():
                labels, _ = self._index.knn_query(unit, width)
        except RuntimeError:
            return None
        found: Labels = labels[0]
        return found

    def save(self, file: BinaryIO) -> NDArray[np.uint8]:
        """The image, which lives in `file`, a file in memory. Raises OSError."""
        with self._lock.read():
            self._index.save_index(path_of(file))
            size = self._index.index_file_size()
        if os.fstat(file.fileno()).st_size != size:
            raise OSError(errno.ENOSPC, "no room in memory for the image of a vector index")
        return np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), np.uint8)

    @classmethod
    def load(cls, file: BinaryIO, dimensions: int) -> tuple["Graph", Labels, Float32]:
        """The graph of an image that has been verified, and the labels and vectors in it that are not deleted."""
        nodes = _nodes(np.frombuffer(file.read(), np.uint8), dimensions)
        index = hnswlib.Index("ip", dimensions)
        index.load_index(path_of(file), max_elements=max(MIN_CAPACITY, len(nodes)))
        dead = nodes["mark"] & DELETED != 0
        graph = cls.__new__(cls)
        graph._hold(index, set(nodes["label"][dead].tolist()))
        return graph, nodes["label"][~dead], nodes["vector"][~dead]


def _nodes(image: NDArray[np.uint8], dimensions: int) -> NDArray[Any]:
    """Layer 0 of an image. Raises IndexDamaged if it is not one of these dimensions."""
    if image.nbytes < HEADER.size:
        raise IndexDamaged("the image is none of a graph")
    _, _, count, node_bytes, label_at, vector_at, _, _, _, links, *_ = HEADER.unpack_from(image.data)
    fits = vector_at == 4 + 4 * links and label_at == vector_at + 4 * dimensions and node_bytes == label_at + 8
    if not fits or image.nbytes < HEADER.size + count * node_bytes:
        raise IndexDamaged("the image is of a graph of other dimensions")
    layout = np.dtype(
        {
            "names": ["mark", "vector", "label"],
            "formats": ["u1", ("<f4", dimensions), "<u8"],
            "offsets": [2, vector_at, label_at],
            "itemsize": node_bytes,
        }
    )
    return np.frombuffer(image, layout, count, HEADER.size)

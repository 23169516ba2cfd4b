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
from millrace.retrieval.index.checks import MAX_EF, check_range, contains
from millrace.retrieval.index.lock import ReadWriteLock
from millrace.retrieval.index.twins import Twins
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
    """Distinct unit vectors, linked to their neighbours. One writer; searches may run beside it."""

    def __init__(self, dimensions: int, settings: GraphSettings):
        index = hnswlib.Index("ip", dimensions)
        index.init_index(MIN_CAPACITY, M=settings.m, ef_construction=settings.ef_construction)
        self._hold(index, set(), Twins())

    def _hold(self, index: Any, deleted: set[int], twins: Twins) -> None:
        index.set_num_threads(1)  # by default it takes every core
        index.set_ef(1)
        self._index, self._deleted, self._twins = index, deleted, twins
        self._moves = 0
        self._lock = ReadWriteLock()

    @property
    def wear(self) -> float:
        """The share of nodes that were deleted or moved. Recall falls as it grows."""
        return (len(self._deleted) + self._moves) / max(1, int(self._index.element_count))

    def add(self, labels: Labels, units: Float32) -> None:
        """Labels must not be there."""
        leading = contains(self._twins.add(labels, units), labels)
        for label, unit in zip(labels[leading].tolist(), units[leading], strict=True):
            self._insert(label, unit)

    def remove(self, labels: Labels, units: Float32) -> None:
        """Labels must be there, with these vectors."""
        for label, unit in zip(labels.tolist(), units, strict=True):
            ended, successor = self._twins.remove(label, unit)
            if successor is not None:
                self._insert(successor, unit)
            if ended is not None:
                with self._lock.write():
                    self._index.mark_deleted(ended)
                    self._deleted.add(ended)

    def _insert(self, label: int, unit: Float32) -> None:
        with self._lock.write():  # for one insertion: about a millisecond
            nodes = self._index.element_count
            if nodes == self._index.max_elements:
                self._index.resize_index(2 * nodes)
            self._index.add_items(unit, label)  # moves the node of a deleted label
            if label in self._deleted:
                self._deleted.remove(label)
                self._moves += 1

    def search(self, unit: Float32, width: int) -> Labels | None:
        """Labels of about the `width` nearest vectors; None: the graph cannot reach so many."""
        try:
            with self._lock.read():
                width = min(width, int(self._index.element_count) - len(self._deleted))
                leaders, _ = self._index.knn_query(unit, width)
        except RuntimeError:
            return None
        return self._twins.expand(leaders[0])

    def save(self, file: BinaryIO) -> list[memoryview]:
        """The image: hnswlib's own, then each follower and its leader. Lives in `file`, a file in memory.

        Raises OSError.
        """
        with self._lock.read():
            self._index.save_index(path_of(file))
            size = self._index.index_file_size()
        if os.fstat(file.fileno()).st_size != size:
            raise OSError(errno.ENOSPC, "no room in memory for the image of a vector index")
        return [memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)), self._twins.followers().data]

    @classmethod
    def load(cls, file: BinaryIO, dimensions: int, count: int) -> tuple["Graph", Labels, Float32]:
        """The graph of an image that has been verified, and the `count` labels and vectors in it."""
        image = np.frombuffer(file.read(), np.uint8)
        nodes = _nodes(image, dimensions)
        dead = nodes["mark"] & DELETED != 0
        labels, units = nodes["label"][~dead], nodes["vector"][~dead]
        end = image.nbytes - 16 * (count - len(labels))
        if not HEADER.size + nodes.nbytes <= end <= image.nbytes:
            raise IndexDamaged(f"the image does not hold {count} vectors")
        followers = image[end:].view("<u8").reshape(-1, 2)
        file.truncate(end)
        index = hnswlib.Index("ip", dimensions)
        try:
            index.load_index(path_of(file), max_elements=max(MIN_CAPACITY, len(nodes)))
        except RuntimeError as error:
            raise IndexDamaged(f"hnswlib: {error}") from None
        order = np.argsort(labels)
        leaders = order[np.searchsorted(labels, followers[:, 1], sorter=order)]
        labels, units = np.concatenate([labels, followers[:, 0]]), np.concatenate([units, units[leaders]])
        twins = Twins()
        twins.add(labels, units)
        graph = cls.__new__(cls)
        graph._hold(index, set(nodes["label"][dead].tolist()), twins)
        return graph, labels, units


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

"""What every index demands of its arguments."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from millrace.retrieval.index.base import Float32, Labels
from millrace.server.errors import ConfigError, InvalidRequest, InvalidVector

MAX_DIMENSIONS, MAX_K, MAX_EF = 8192, 1000, 2048
MAX_LABEL = (1 << 63) - 1


def check_range(name: str, value: int, low: int, high: int) -> None:
    """A setting of the index. Raises ConfigError."""
    if not low <= value <= high:
        raise ConfigError(f"{name} of a vector index must be in [{low}, {high}]; it is {value}")


def check_search(k: int, ef_search: int | None) -> None:
    if not 1 <= k <= MAX_K:
        raise InvalidRequest.at("k", f"must be in [1, {MAX_K}]; it is {k}")
    if ef_search is not None and not 1 <= ef_search <= MAX_EF:
        raise InvalidRequest.at("ef_search", f"must be in [1, {MAX_EF}]; it is {ef_search}")


def check_labels(labels: Sequence[int] | Labels) -> Labels:
    """[n] as uint64. Raises ValueError outside [0, 2^63)."""
    values = [int(label) for label in labels]
    if values and not 0 <= min(values) <= max(values) <= MAX_LABEL:
        raise ValueError(f"labels must be in [0, 2^63); they span [{min(values)}, {max(values)}]")
    return np.array(values, np.uint64)


def check_allowed(allowed: Labels) -> Labels:
    """Raises ValueError unless strictly ascending: a search relies on it."""
    if np.any(allowed[1:] <= allowed[:-1]):
        raise ValueError("allowed labels must ascend, each once")
    return allowed


def contains(ascending: Labels, labels: Labels) -> NDArray[np.bool_]:
    """[n]: whether each of `labels` is among `ascending`."""
    if not len(ascending):
        return np.zeros(len(labels), np.bool_)
    places = np.minimum(np.searchsorted(ascending, labels), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[places] == labels
    return found


def unit_rows(vectors: ArrayLike, dimensions: int) -> Float32:
    """[n, dimensions], each of length 1. Raises InvalidVector."""
    rows = np.asarray(vectors)
    if rows.ndim != 2 or rows.shape[1] != dimensions:
        raise InvalidVector.at("vectors", f"must have the shape [n, {dimensions}]; it is {list(rows.shape)}")
    return _unit(rows, "vectors[{}]").astype(np.float32)


def unit_query(query: ArrayLike, dimensions: int) -> NDArray[np.float64]:
    """[dimensions], of length 1. Raises InvalidVector."""
    row = np.asarray(query)
    if row.shape != (dimensions,):
        raise InvalidVector.at("vector", f"must have {dimensions} dimensions; its shape is {list(row.shape)}")
    unit: NDArray[np.float64] = _unit(row[None], "vector")[0]
    return unit


def _unit(rows: NDArray[np.generic], name: str) -> NDArray[np.float64]:
    """In float64, where no finite float32 overflows or vanishes when squared."""
    wide = rows.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    for wrong, words in ((~np.isfinite(lengths), "must be finite"), (lengths == 0, "must not be all zeros")):
        if wrong.any():
            raise InvalidVector.at(name.format(int(np.flatnonzero(wrong)[0])), words)
    units: NDArray[np.float64] = wide / lengths[:, None]
    return units

"""The exact index against the definition, at sizes where it works in blocks."""

import numpy as np
import pytest

from millrace.retrieval.index.flat import GATHER_ROWS, FlatIndex

COUNT, DIMENSIONS = 5 * GATHER_ROWS, 9
VECTORS = np.random.default_rng(0).standard_normal((COUNT, DIMENSIONS)).astype(np.float32)


@pytest.fixture(scope="module")
def index() -> FlatIndex:
    made = FlatIndex(DIMENSIONS)
    order = np.random.default_rng(1).permutation(COUNT)
    made.add(order, VECTORS[order])
    return made


@pytest.mark.parametrize(
    "allowed", [None, 1, GATHER_ROWS - 1, GATHER_ROWS, GATHER_ROWS + 1, 2 * GATHER_ROWS + 7, COUNT - 3]
)
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_against_the_definition(index: FlatIndex, allowed: int | None, k: int) -> None:
    draw = np.random.default_rng(2)
    labels = np.arange(COUNT) if allowed is None else np.sort(draw.choice(COUNT, allowed, replace=False))
    units = VECTORS / np.linalg.norm(VECTORS.astype(np.float64), axis=1)[:, None]
    for query in draw.standard_normal((10, DIMENSIONS)).astype(np.float32):
        scores = units[labels] @ query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
        best = np.argsort(-scores)[:k]
        found = index.search(query, k, allowed=None if allowed is None else labels.astype(np.uint64))
        np.testing.assert_array_equal(found.labels, labels[best])
        np.testing.assert_allclose(found.scores, scores[best], atol=3e-7)


def test_a_thousand_copies_are_ordered_by_label() -> None:
    index = FlatIndex(3)
    order = np.random.default_rng(0).permutation(3 * GATHER_ROWS)
    index.add(order, np.tile(np.array([[0.1, 0.2, 0.3]], np.float32), (len(order), 1)))
    found = index.search(np.array([3, 1, 2], np.float32), 500)
    assert found.labels.tolist() == list(range(500))
    assert len(set(found.scores.tolist())) == 1

"""The graph against the exact index, on vectors that are clustered as embeddings are."""

import threading
from pathlib import Path

import numpy as np
import pytest

from millrace.bench.index import clustered
from millrace.retrieval.index.auto import AutoIndex
from millrace.retrieval.index.base import Float32, Labels
from millrace.retrieval.index.flat import FlatIndex
from millrace.retrieval.index.graph import MIN_CAPACITY
from millrace.retrieval.index.hnsw import MAX_WEAR, HnswIndex
from millrace.server.errors import ConfigError

COUNT, DIMENSIONS = 4000, 96
VECTORS, QUERIES = clustered(COUNT, DIMENSIONS), clustered(150, DIMENSIONS, seed=1)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    index = HnswIndex(DIMENSIONS)
    index.add(range(COUNT), VECTORS)
    path = tmp_path_factory.mktemp("hnsw") / "index"
    index.save(path, "model")
    return path


@pytest.fixture
def index(image: Path) -> HnswIndex:
    made = HnswIndex(DIMENSIONS)
    made.load(image, "model")
    return made


def recall(index: HnswIndex, queries: Float32 = QUERIES, k: int = 10, allowed: Labels | None = None) -> float:
    """Share of the k best scores that are reached; every label that is found must be allowed."""
    reached = wanted = 0
    for query in queries:
        true, found = index.search(query, k, allowed=allowed, exact=True), index.search(query, k, allowed=allowed)
        assert allowed is None or np.isin(found.labels, allowed).all()
        assert np.isin(found.labels, index.labels()).all()
        reached += int(np.sum(found.scores >= true.scores[-1]))
        wanted += len(true.scores)
    return reached / wanted


def graph_answers(
    index: HnswIndex, monkeypatch: pytest.MonkeyPatch, allowed: Labels | None = None, queries: Float32 = QUERIES
) -> bool:
    """Whether these searches do without the exact index."""
    calls: list[object] = []
    exact = FlatIndex.search
    with monkeypatch.context() as patch:
        patch.setattr(FlatIndex, "search", lambda *a, **o: (calls.append(a), exact(*a, **o))[1])
        for query in queries[:20]:
            index.search(query, 10, allowed=allowed)
    return not calls


@pytest.mark.parametrize("k", [1, 10, 20])
def test_recall_at_the_default_setting(index: HnswIndex, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    assert graph_answers(index, monkeypatch)
    assert recall(index, k=k) >= 0.98


@pytest.mark.parametrize("share", [0.1, 0.24, 0.3, 0.5])
def test_recall_after_deletions(index: HnswIndex, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Up to a quarter they are marked; beyond, the graph is built anew."""
    doomed = np.random.default_rng(0).choice(COUNT, int(share * COUNT), replace=False)
    for some in np.array_split(doomed, 5):
        index.remove(some)
    assert len(index) == COUNT - len(doomed)
    assert graph_answers(index, monkeypatch)
    assert recall(index) >= 0.98


def test_recall_without_whole_topics(index: HnswIndex) -> None:
    index.remove(range(COUNT // 5))
    assert recall(index) >= 0.98
    assert recall(index, VECTORS[: COUNT // 5 : 10]) >= 0.98


def test_recall_after_replacements(index: HnswIndex) -> None:
    chosen = np.random.default_rng(0).choice(COUNT, COUNT // 5, replace=False)
    index.add(chosen, clustered(len(chosen), DIMENSIONS, seed=2))
    assert recall(index) >= 0.98
    index.remove(chosen[:200])
    index.add(chosen[:200], clustered(200, DIMENSIONS, seed=3))  # deleted labels come back elsewhere
    assert recall(index) >= 0.98


@pytest.mark.parametrize("share", [0.9, 0.6, 0.5, 0.05, 0.001])
def test_recall_with_filters(index: HnswIndex, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    labels = np.random.default_rng(0).choice(COUNT, int(share * COUNT), replace=False)
    allowed = np.sort(labels).astype(np.uint64)
    assert graph_answers(index, monkeypatch, allowed) == (share > 0.5)
    assert recall(index, allowed=allowed) >= 0.98


def test_a_filter_that_excludes_the_neighbourhood(index: HnswIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph finds is not allowed, so the exact index answers."""
    query = VECTORS[10]
    near = index.search(query, 1000, exact=True).labels
    allowed = np.setdiff1d(index.labels(), near)
    assert not graph_answers(index, monkeypatch, allowed, query[None])
    assert recall(index, query[None], allowed=allowed) == 1


def test_copies_do_not_hide_the_others(image: Path) -> None:
    """A fifth of the vectors are copies of five, and come first: that is what boilerplate does."""
    vectors = np.concatenate([np.repeat(VECTORS[:5], COUNT // 25, axis=0), VECTORS[COUNT // 5 :]])
    index = HnswIndex(DIMENSIONS)
    index.add(range(COUNT), vectors)
    assert recall(index) >= 0.98
    assert recall(index, vectors[::40]) >= 0.98
    # Of the 160 copies only every eighth stays, the first of them not.
    index.remove([label for label in range(COUNT // 5) if label % 8 != 3])
    found = index.search(VECTORS[2], 10)
    assert found.labels.tolist() == [label for label in range(320, 480) if label % 8 == 3][:10]
    assert set(found.scores.tolist()) == {1.0}
    index.save(image.parent / "copies", "model")
    again = HnswIndex(DIMENSIONS)
    again.load(image.parent / "copies", "model")
    assert again.search(VECTORS[2], 10).labels.tolist() == found.labels.tolist()
    again.remove(range(COUNT // 5))
    assert again.search(VECTORS[2], 1).labels[0] >= COUNT // 5


def test_nothing_but_copies() -> None:
    index = HnswIndex(8)
    index.add(range(3000), np.ones((3000, 8), np.float32))
    assert index.search(np.ones(8, np.float32), 10).labels.tolist() == list(range(10))
    index.remove(range(2999))
    assert index.search(np.ones(8, np.float32), 10).labels.tolist() == [2999]
    index.remove([2999])
    index.add([1], np.ones((1, 8), np.float32))
    assert index.search(np.ones(8, np.float32), 10).labels.tolist() == [1]


def test_fewer_vectors_than_the_search_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    index = HnswIndex(DIMENSIONS, ef_search=200)
    index.add(range(4500), np.tile(VECTORS[:150], (30, 1)))
    assert graph_answers(index, monkeypatch, queries=VECTORS[:20])
    assert recall(index, VECTORS[:150]) == 1


def test_what_the_graph_cannot_reach_is_searched_exactly(index: HnswIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        element_count = COUNT

        def knn_query(self, unit: Float32, k: int) -> None:
            raise RuntimeError("Cannot return the results in a contiguous 2D array")

    monkeypatch.setattr(index._parts[1], "_index", Unreachable())
    assert not graph_answers(index, monkeypatch)
    assert recall(index) == 1


def test_an_image_keeps_what_was_deleted(index: HnswIndex, tmp_path: Path) -> None:
    index.remove(range(400))
    index.save(tmp_path / "index", "model")
    again = HnswIndex(DIMENSIONS)
    again.load(tmp_path / "index", "model")
    assert again._parts[1].wear == index._parts[1].wear == 0.1
    again.add(range(400), VECTORS[:400])
    assert again.labels().tolist() == list(range(COUNT))
    assert recall(again, VECTORS[:400:10]) >= 0.98
    again.remove(range(int(MAX_WEAR * COUNT) + 1))
    assert again._parts[1].wear == 0


def test_width_is_the_querys_own(index: HnswIndex) -> None:
    """Searches of different width in other threads do not change each other's."""
    query, k = QUERIES[0], 2
    narrow = [index.search(query, k, ef_search=1).labels.tolist() for query in QUERIES]
    done = threading.Event()

    def wide() -> None:
        while not done.is_set():
            index.search(query, k, ef_search=400)

    thread = threading.Thread(target=wide)
    thread.start()
    try:
        assert [index.search(query, k, ef_search=1).labels.tolist() for query in QUERIES] == narrow
    finally:
        done.set()
        thread.join()


def test_grows_past_its_first_capacity() -> None:
    index = HnswIndex(8)
    vectors = np.random.default_rng(0).standard_normal((2 * MIN_CAPACITY + 3, 8)).astype(np.float32)
    for start in range(0, len(vectors), 500):
        some = vectors[start : start + 500]
        index.add(range(start, start + len(some)), some)
    assert len(index) == len(vectors)
    assert index.search(vectors[-1], 1).labels.tolist() == [len(vectors) - 1]


def test_a_worn_graph_is_built_anew(index: HnswIndex) -> None:
    graph = index._parts[1]
    index.remove(range(int(MAX_WEAR * COUNT)))
    assert index._parts[1] is graph
    index.remove([COUNT - 1])
    assert index._parts[1] is not graph
    assert index._parts[1].wear == 0


@pytest.mark.parametrize(
    "settings", [{"m": 3}, {"m": 65}, {"ef_construction": 0}, {"ef_search": 0}, {"ef_search": 2049}]
)
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        HnswIndex(8, **settings)  # type: ignore[arg-type]


def test_auto_changes_its_kind(tmp_path: Path) -> None:
    index = AutoIndex(DIMENSIONS, flat_until=500)
    index.add(range(500), VECTORS[:500])
    assert index.kind == "flat"
    index.save(tmp_path / "flat", "model")
    index.add([500], VECTORS[500:501])
    assert index.kind == "hnsw"
    index.remove(range(250))
    assert (index.kind, len(index)) == ("hnsw", 251)
    index.save(tmp_path / "hnsw", "model")
    index.remove([300, 301])
    assert (index.kind, len(index)) == ("flat", 249)
    for name, kind, count in (("flat", "flat", 500), ("hnsw", "hnsw", 251)):
        index.load(tmp_path / name, "model")
        assert (index.kind, len(index)) == (kind, count)
    smaller = AutoIndex(DIMENSIONS, flat_until=100)
    smaller.load(tmp_path / "flat", "model")
    assert (smaller.kind, len(smaller)) == ("hnsw", 500)
    larger = AutoIndex(DIMENSIONS)
    larger.load(tmp_path / "hnsw", "model")
    assert (larger.kind, len(larger)) == ("flat", 251)
    assert larger.search(VECTORS[400], 1).labels.tolist() == [400]


def test_scores_are_those_of_the_exact_index(index: HnswIndex) -> None:
    flat = FlatIndex(DIMENSIONS)
    order = np.random.default_rng(0).permutation(COUNT)
    flat.add(order, VECTORS[order])
    for query in QUERIES[:30]:
        ours, exact = index.search(query, 10, exact=True), flat.search(query, 10)
        np.testing.assert_array_equal(ours.labels, exact.labels)
        np.testing.assert_array_equal(ours.scores, exact.scores)

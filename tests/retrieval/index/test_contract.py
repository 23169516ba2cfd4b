"""What every index promises, whatever it is made of."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from millrace.retrieval.index.auto import AutoIndex
from millrace.retrieval.index.base import Float32, Labels, Neighbours, VectorIndex
from millrace.retrieval.index.flat import FlatIndex
from millrace.retrieval.index.hnsw import HnswIndex
from millrace.server.errors import ConfigError, IndexDamaged, InvalidRequest, InvalidVector

DIMENSIONS = 12
Make = Callable[[], VectorIndex]
# The settings are low so that these small indexes use their graph, and change their kind.
KINDS: dict[str, Callable[[int], VectorIndex]] = {
    "flat": FlatIndex,
    "hnsw": lambda dimensions: HnswIndex(dimensions, ef_search=2),
    "auto": lambda dimensions: AutoIndex(dimensions, flat_until=60),
}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Make:
    return lambda: KINDS[request.param](DIMENSIONS)


def vectors_of(labels: Any) -> Float32:
    """[n, DIMENSIONS], each made from its label alone; every seventh is the same as the one before."""
    seeds = (int(label) - (int(label) % 7 == 6) for label in labels)
    rows = [np.random.default_rng(seed).standard_normal(DIMENSIONS) for seed in seeds]
    return np.array(rows, np.float32).reshape(-1, DIMENSIONS)


def filled(make: Make, count: int) -> VectorIndex:
    index = make()
    index.add(range(count), vectors_of(range(count)))
    return index


def true_neighbours(stored: dict[int, Float32], query: Float32, k: int) -> Neighbours:
    """By definition, in float64."""

    def cosine(vector: Float32) -> np.float32:
        a, b = vector.astype(np.float64), query.astype(np.float64)
        return np.float32(a @ b / np.sqrt((a @ a) * (b @ b)))

    scores = {label: cosine(vector) for label, vector in stored.items()}
    best = sorted(scores, key=lambda label: (-scores[label], label))[:k]
    return Neighbours(np.array(best, np.uint64), np.array([scores[label] for label in best], np.float32))


def check_equal(found: Neighbours, true: Neighbours) -> None:
    """Labels may change places only where their scores agree to the last digits."""
    np.testing.assert_allclose(found.scores, true.scores, atol=3e-7)
    for label, other, score in zip(found.labels, true.labels, true.scores, strict=True):
        assert label == other or np.sum(abs(true.scores - score) < 3e-7) > 1 or score == true.scores[-1]


def check_sound(found: Neighbours, query: Float32, stored: dict[int, Float32], expected: int) -> None:
    """Right labels with right scores in the right order, though maybe not the nearest."""
    labels = [int(label) for label in found.labels]
    assert len(set(labels)) == len(labels) == expected
    again = true_neighbours({label: stored[label] for label in labels}, query, len(labels))
    check_equal(found, again)


def test_the_nearest_first(make: Make) -> None:
    index = filled(make, 50)
    query = vectors_of([13])[0]
    found = index.search(query, 3)
    # 12 and 13 are the same vector: equal scores are ordered by label.
    assert found.labels.tolist()[:2] == [12, 13]
    assert found.labels.dtype == np.uint64
    assert found.scores.dtype == np.float32
    assert found.scores[0] == found.scores[1] == pytest.approx(1)
    assert all(a >= b for a, b in pairwise(found.scores))
    np.testing.assert_array_equal(index.search(1000 * query, 3).scores, found.scores)
    assert index.dimensions == DIMENSIONS


def test_equal_vectors_are_ordered_by_label_wherever_they_lie(make: Make) -> None:
    index = filled(make, 100)
    twins = np.random.default_rng(0).permutation(np.arange(1000, 1040))
    index.add(twins, np.tile(vectors_of([500]), (40, 1)))
    index.remove(range(0, 100, 3))
    found = index.search(vectors_of([500])[0], 8, exact=True)
    assert found.labels.tolist() == list(range(1000, 1008))
    assert len(set(found.scores.tolist())) == 1


def test_fewer_than_asked_for(make: Make) -> None:
    index = make()
    query = vectors_of([1])[0]
    assert len(index) == 0
    assert index.search(query, 1000).labels.tolist() == []
    index.add([7], vectors_of([7]))
    assert index.search(query, 1000).labels.tolist() == [7]
    index.remove([7])
    assert index.search(query, 1).labels.tolist() == []
    assert index.labels().tolist() == []


def test_labels_ascend(make: Make) -> None:
    index = make()
    labels = [2**63 - 1, 5, 0, 10**12]
    index.add(labels, vectors_of(range(4)))
    assert index.labels().tolist() == sorted(labels)
    assert index.labels().dtype == np.uint64
    assert index.search(vectors_of([0])[0], 1).labels.tolist() == [2**63 - 1]


def test_a_label_that_is_there_is_replaced(make: Make) -> None:
    index = filled(make, 200)
    old, new = vectors_of([100])[0], vectors_of([9000])[0]
    index.add([100, 100], np.stack([old, new]))  # the last counts
    assert len(index) == 200
    assert index.search(new, 1).labels.tolist() == [100]
    assert index.search(old, 1).labels.tolist() != [100]
    index.remove([100])
    index.add([100], old[None])
    assert index.search(old, 1).labels.tolist() == [100]


def test_unknown_labels_are_not_removed(make: Make) -> None:
    index = filled(make, 5)
    index.remove([3, 3, 99])
    index.remove([3])
    index.remove([])
    assert index.labels().tolist() == [0, 1, 2, 4]


WRONG: dict[str, tuple[Any, str]] = {
    "NaN": ([np.nan] * DIMENSIONS, "finite"),
    "one NaN": ([1.0] * (DIMENSIONS - 1) + [np.nan], "finite"),
    "infinity": ([np.inf] + [1.0] * (DIMENSIONS - 1), "finite"),
    "zeros": ([0.0] * DIMENSIONS, "zeros"),
    "too short": ([1.0] * (DIMENSIONS - 1), str(DIMENSIONS)),
    "too long": ([1.0] * (DIMENSIONS + 1), str(DIMENSIONS)),
    "nothing": ([], str(DIMENSIONS)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_vectors_change_nothing(make: Make, wrong: str) -> None:
    index = filled(make, 5)
    vector, words = WRONG[wrong]
    bad = np.array(vector, np.float32)
    with pytest.raises(InvalidVector, match=words):
        index.search(bad, 1)
    if len(vector) == DIMENSIONS:
        with pytest.raises(InvalidVector, match=r"vectors\[1\].*" + words):
            index.add([3, 70], np.stack([vectors_of([9])[0], bad]))
    with pytest.raises(InvalidVector, match=words):
        index.add([70], bad[None])
    assert index.labels().tolist() == [0, 1, 2, 3, 4]
    check_equal(index.search(vectors_of([3])[0], 1), true_neighbours({3: vectors_of([3])[0]}, vectors_of([3])[0], 1))


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_lengths_near_the_limits_of_float32(make: Make, scale: float) -> None:
    index = make()
    index.add(range(20), vectors_of(range(20)) * np.float32(scale))
    found = index.search(vectors_of([4])[0] * np.float32(scale), 1)
    assert found.labels.tolist() == [4]
    assert found.scores[0] == pytest.approx(1)


def test_arguments_out_of_range(make: Make) -> None:
    index = filled(make, 5)
    query = vectors_of([1])[0]
    for k in (-1, 0, 1001):
        with pytest.raises(InvalidRequest, match="1000"):
            index.search(query, k)
    for ef_search in (-1, 0, 2049):
        with pytest.raises(InvalidRequest, match="2048"):
            index.search(query, 1, ef_search=ef_search)
    for label in (-1, 2**63):
        with pytest.raises(ValueError, match="labels"):
            index.add([label], vectors_of([1]))
        with pytest.raises(ValueError, match="labels"):
            index.remove([label])
    with pytest.raises(ValueError, match="2 labels for 1 vectors"):
        index.add([8, 9], vectors_of([8]))
    assert len(index) == 5


@pytest.mark.parametrize("dimensions", [0, 8193])
@pytest.mark.parametrize("kind", KINDS)
def test_dimensions_out_of_range(kind: str, dimensions: int) -> None:
    with pytest.raises(ConfigError, match="8192"):
        KINDS[kind](dimensions)


def as_labels(labels: Any) -> Labels:
    return np.array(sorted(labels), np.uint64)


def test_only_what_is_allowed(make: Make) -> None:
    index = filled(make, 300)
    query = vectors_of([8])[0]
    for allowed in ([], [9999], [4], [4, 9999], range(0, 300, 2), range(3, 300), range(1000)):
        there = {label: vectors_of([label])[0] for label in allowed if label < 300}
        for k in (1, 5):
            found = index.search(query, k, allowed=as_labels(allowed))
            check_sound(found, query, there, min(k, len(there)))
            exact = index.search(query, k, allowed=as_labels(allowed), exact=True)
            check_equal(exact, true_neighbours(there, query, k))
    for wrong in ([5, 4], [4, 4]):
        with pytest.raises(ValueError, match="ascend"):
            index.search(query, 1, allowed=np.array(wrong, np.uint64))


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_against_a_dictionary(make: Make, seed: int, tmp_path: Path) -> None:
    draw, index, stored = Random(seed), make(), dict[int, Float32]()
    for _ in range(150):
        match draw.choice(["add", "add", "add", "remove", "search", "search", "reload"]):
            case "add":
                labels = [draw.randrange(400) for _ in range(draw.randrange(12))]
                vectors = vectors_of([draw.choice([label, draw.randrange(400)]) for label in labels])
                index.add(labels, vectors)
                stored |= dict(zip(labels, vectors, strict=True))
            case "remove":
                labels = [draw.randrange(400) for _ in range(draw.randrange(25))]
                index.remove(labels)
                for label in labels:
                    stored.pop(label, None)
            case "search":
                query, k = vectors_of([draw.randrange(400)])[0], draw.choice([1, 2, 10, 100])
                allowed = draw.choice([None, draw.sample(range(400), draw.choice([0, 3, 200, 390]))])
                some = {label: v for label, v in stored.items() if allowed is None or label in allowed}
                mask = None if allowed is None else as_labels(allowed)
                check_sound(index.search(query, k, allowed=mask), query, some, min(k, len(some)))
                check_equal(index.search(query, k, allowed=mask, exact=True), true_neighbours(some, query, k))
            case "reload":
                index.save(tmp_path / "index", "model")
                index = make()
                index.load(tmp_path / "index", "model")
        assert index.labels().tolist() == sorted(stored)
        assert len(index) == len(stored)


@pytest.mark.parametrize("count", [0, 1, 59, 500])
def test_an_image_gives_the_same_neighbours(make: Make, tmp_path: Path, count: int) -> None:
    index, loaded = filled(make, count), filled(make, 70)
    index.remove(range(0, count, 9))
    index.save(tmp_path / "index", "model")
    loaded.load(tmp_path / "index", "model")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    for query in vectors_of(range(30)):
        for k in (1, 10):
            before, after = index.search(query, k), loaded.search(query, k)
            np.testing.assert_array_equal(before.labels, after.labels)
            np.testing.assert_array_equal(before.scores, after.scores)
    loaded.add([600], vectors_of([600]))
    loaded.remove([600, 1])
    assert loaded.labels().tolist() == [label for label in index.labels().tolist() if label != 1]


def test_a_foreign_image_changes_nothing(make: Make, tmp_path: Path) -> None:
    index = filled(make, 20)
    index.save(tmp_path / "index", "model")
    with pytest.raises(IndexDamaged, match="model"):
        index.load(tmp_path / "index", "another")
    for kind in KINDS.values():
        other = kind(DIMENSIONS + 1)
        other.save(tmp_path / "other", "model")
        with pytest.raises(IndexDamaged, match="dimensions"):
            index.load(tmp_path / "other", "model")
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(IndexDamaged):
            index.load(path, "model")
    assert index.labels().tolist() == list(range(20))
    assert index.search(vectors_of([8])[0], 1).labels.tolist() == [8]


def test_images_of_another_kind(tmp_path: Path) -> None:
    flat, hnsw = (filled(lambda kind=kind: KINDS[kind](DIMENSIONS), 100) for kind in ("flat", "hnsw"))  # type: ignore[misc]
    flat.save(tmp_path / "flat", "model")
    hnsw.save(tmp_path / "hnsw", "model")
    with pytest.raises(IndexDamaged, match="flat"):
        flat.load(tmp_path / "hnsw", "model")
    with pytest.raises(IndexDamaged, match="hnsw"):
        hnsw.load(tmp_path / "flat", "model")


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Of threads, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_searches_beside_a_writer(make: Make, tmp_path: Path) -> None:
    """Labels below 100 stay; the others come and go while three threads search."""
    index = filled(make, 100)
    stored = {label: vectors_of([label])[0] for label in range(500)}
    stays = as_labels(range(100))
    stop, failures, searches = threading.Event(), list[BaseException](), [0, 0, 0]

    def search(number: int) -> None:
        draw = Random(number)
        try:
            while not stop.is_set():
                query = stored[draw.randrange(500)]
                if number == 0:
                    found = index.search(query, 3, allowed=stays)
                    check_sound(found, query, {label: stored[label] for label in range(100)}, 3)
                else:
                    check_sound(index.search(query, 3, exact=number == 1), query, stored, 3)
                searches[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(3)]
    with frequent_switches():
        for thread in threads:
            thread.start()
        draw = Random(9)
        for turn in range(30):
            some = draw.sample(range(100, 500), 40)
            index.add(some, vectors_of(some))
            index.remove(draw.sample(range(100, 500), 50))
            if turn % 4 == 0:
                index.save(tmp_path / "index", "model")
            if turn % 10 == 9:
                index.load(tmp_path / "index", "model")
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures, failures[0]
    assert min(searches) > 5

"""The vector index: exact search against the graph.

    python -m millrace.bench.index [--sizes 1000,5000,10000,20000] [--dimensions 384] [--quick]

Vectors are clustered as embeddings of texts are (`clustered`); queries are new members of the clusters. Two tables:

1. For each size: how much faster the graph answers than the exact search (above 1 the graph wins), its recall@10
   against it, the microseconds of either (median), and the seconds to build, save and load.
2. At the largest size, with filters that allow a part of the vectors and after deletions: the same ratio and recall.

The thresholds of `retrieval/index` come from here: `FLAT_UNTIL`, `ROWS_PER_CANDIDATE`, `GATHER_SHARE` and the default
`ef_search`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from millrace.retrieval.index.base import Float32, Labels, Neighbours
from millrace.retrieval.index.flat import FlatIndex
from millrace.retrieval.index.hnsw import HnswIndex

K = 10
Search = Callable[[Float32], Neighbours]


def clustered(count: int, dimensions: int, seed: int = 0) -> Float32:
    """[count, dimensions]: topics of uneven size within a few fields, all a little alike, as embeddings are.

    Of 8,000 in 384 dimensions the nearest has a cosine of 0.57 on average, the tenth 0.48, the median 0.01; all-MiniLM
    over paragraphs of documentation: 0.65, 0.45 and 0.02. Rows of one topic follow each other, as chunks do.
    """
    structure, draws = np.random.default_rng(7), np.random.default_rng(seed)
    spread = 1 / np.sqrt(np.arange(1, dimensions + 1))
    rotation = np.linalg.qr(structure.standard_normal((dimensions, dimensions)))[0]

    def points(of: np.random.Generator, n: int, scale: float) -> Float32:
        rows = of.standard_normal((n, dimensions)) * spread
        scaled: Float32 = (scale * rows / np.sqrt(np.square(spread).sum())).astype(np.float32)
        return scaled

    fields, topics = points(structure, 30, 0.3), points(structure, 500, 0.5)
    sizes = 1 / np.arange(1, len(topics) + 1) ** 0.7
    topic = np.sort(draws.choice(len(topics), count, p=sizes / sizes.sum()))
    field = structure.integers(len(fields), size=len(topics))
    common = points(structure, 1, 0.1)
    vectors = common + fields[field[topic]] + topics[topic] + points(draws, count, 0.8)
    return np.asarray(vectors @ rotation, np.float32)


def median_us(search: Search, queries: Float32) -> float:
    """Over the queries, of the best of three runs of each: other processes only ever add."""
    return median(min(seconds(partial(search, query)) for _ in range(3)) for query in queries) * 1e6


def recall(search: Search, oracle: Search, queries: Float32) -> float:
    """Share of the true K nearest that are found."""
    found = wanted = 0
    for query in queries:
        true = oracle(query).labels
        wanted += len(true)
        found += len(np.intersect1d(search(query).labels, true))
    return found / wanted


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right")
    return made


def compared(hnsw: HnswIndex, flat: FlatIndex, queries: Float32, allowed: Labels | None = None) -> list[str]:
    """The ratio, the recall and the two times."""

    def ours(query: Float32) -> Neighbours:
        return hnsw.search(query, K, allowed=allowed)

    def exact(query: Float32) -> Neighbours:
        return flat.search(query, K, allowed=allowed)

    ours_us, exact_us = median_us(ours, queries), median_us(exact, queries)
    return [
        f"{exact_us / ours_us:.2f}",
        f"{recall(ours, exact, queries):.4f}",
        f"{ours_us:,.0f}",
        f"{exact_us:,.0f}",
    ]


COMPARED = ("flat/hnsw", "recall@10", "hnsw us", "flat us")


def built(vectors: Float32, made: Table, queries: Float32) -> tuple[HnswIndex, FlatIndex]:
    """Both indexes of these vectors, and a row about them."""
    count, dimensions = vectors.shape
    hnsw, flat = HnswIndex(dimensions), FlatIndex(dimensions)
    flat.add(range(count), vectors)
    build = seconds(lambda: hnsw.add(range(count), vectors))
    row = compared(hnsw, flat, queries)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "index"
        save, load = seconds(lambda: hnsw.save(path, "")), seconds(lambda: hnsw.load(path, ""))
    made.add_row(f"{count:,}", *row, f"{build:.1f}", f"{save:.2f}", f"{load:.2f}")
    return hnsw, flat


def filtered(hnsw: HnswIndex, flat: FlatIndex, queries: Float32) -> Table:
    made = table(f"{len(flat):,} vectors, of which a part is allowed, or after deletions", "case", *COMPARED)
    draws, labels = np.random.default_rng(1), flat.labels()
    for share in (0.5, 0.2, 0.05, 0.001):
        allowed = np.sort(draws.choice(labels, int(share * len(labels)), replace=False))
        made.add_row(f"{share:.1%} allowed", *compared(hnsw, flat, queries, allowed))
    for share in (0.1, 0.24, 0.3, 0.5):
        doomed = draws.choice(flat.labels(), len(flat) - round((1 - share) * len(labels)), replace=False)
        took = seconds(partial(hnsw.remove, doomed))
        flat.remove(doomed)
        made.add_row(f"{share:.0%} deleted in {took:.1f} s", *compared(hnsw, flat, queries))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="1000,5000,10000,20000", help="how many vectors, ascending")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--quick", action="store_true", help="a short look: 1,000 and 3,000 vectors of 64 dimensions")
    arguments = parser.parse_args()
    sizes = [1000, 3000] if arguments.quick else [int(size) for size in arguments.sizes.split(",")]
    dimensions = 64 if arguments.quick else arguments.dimensions
    console = Console(width=110)
    queries = clustered(200, dimensions, seed=1)
    made = table(f"Vectors of {dimensions} dimensions", "vectors", *COMPARED, "build s", "save s", "load s")
    for size in sizes:
        hnsw, flat = built(clustered(size, dimensions), made, queries)
    console.print(made)
    console.print(filtered(hnsw, flat, queries))


if __name__ == "__main__":
    main()

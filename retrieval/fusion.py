"""From the rankings of several stages to one."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

# How little the first ranks of a stage stand out. The paper takes 60, for dozens of rankings; for two short ones 2
# to 10 put the right document first more often (docs/measurements.md).
K = 5


def reciprocal_rank_fusion(rankings: Iterable[Sequence[int]], k: int = K) -> list[tuple[int, float]]:
    """Labels with their scores, best first: an item scores the sum of 1 / (k + its rank) over the rankings it is in.

    Ranks count from 1. Scores of stages are never compared, so they need no common scale. Of equal scores the one
    with the better single rank is first, then the one of the earlier ranking. Cormack, Clarke and Buettcher,
    "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods", SIGIR 2009.
    """
    scores: dict[int, float] = defaultdict(float)
    best: dict[int, tuple[int, int]] = {}
    for number, ranking in enumerate(rankings):
        for rank, label in enumerate(ranking, start=1):
            scores[label] += 1 / (k + rank)
            best[label] = min(best.get(label, (rank, number)), (rank, number))
    return sorted(scores.items(), key=lambda item: (-item[1], best[item[0]], item[0]))

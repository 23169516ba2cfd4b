"""Reciprocal rank fusion against its formula."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.retrieval.fusion import reciprocal_rank_fusion


def test_by_hand() -> None:
    fused = reciprocal_rank_fusion([[10, 20, 30], [30, 10]])
    assert [label for label, _ in fused] == [10, 30, 20]
    assert [score for _, score in fused] == pytest.approx([1 / 6 + 1 / 7, 1 / 8 + 1 / 6, 1 / 7])


def test_equal_scores_have_an_order() -> None:
    assert [label for label, _ in reciprocal_rank_fusion([[9, 8], [7, 6]])] == [9, 7, 8, 6]
    assert [label for label, _ in reciprocal_rank_fusion([[], [3]])] == [3]
    assert reciprocal_rank_fusion([]) == []


@given(st.lists(st.lists(st.integers(0, 30), unique=True, max_size=20), max_size=3))
def test_every_candidate_once_with_the_sum_of_its_ranks(rankings: list[list[int]]) -> None:
    fused = reciprocal_rank_fusion(rankings)
    expected = {
        label: sum(1 / (6 + ranking.index(label)) for ranking in rankings if label in ranking)
        for ranking in rankings
        for label in ranking
    }
    assert dict(fused) == pytest.approx(expected)
    assert len(fused) == len(expected)
    scores = [score for _, score in fused]
    assert scores == sorted(scores, reverse=True)

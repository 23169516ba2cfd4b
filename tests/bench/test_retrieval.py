"""The quality that docs/measurements.md reports, on the example shop: small enough for every test run."""

from pathlib import Path
from statistics import mean

import pytest
from rich.console import Console

from millrace.bench.retrieval import MODES, answer, fill, rank, refused, shop
from millrace.server.client import Client
from millrace.server.local import local_server
from millrace.server.model.embedder import locate_embedder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(locate_embedder("auto") is None, reason="the default embedding model is not installed"),
]


def test_search_and_answers_on_the_shop(tmp_path: Path) -> None:
    documents, questions = shop()
    known = [question for question in questions if question.document]
    unknown = [question for question in questions if not question.document]
    with local_server(f"--data-dir={tmp_path}") as address, Client(address) as client:
        fill(client, documents, iter(()), 0, Console(quiet=True))
        lexical, vector, hybrid = (rank(client, known, mode) for mode in MODES)
        for measure in ("mrr", "ndcg"):
            assert getattr(hybrid, measure) > max(getattr(lexical, measure), getattr(vector, measure))
        assert hybrid.recall(1) >= max(lexical.recall(1), vector.recall(1))
        assert hybrid.recall(5) >= 0.9
        answers = [answer(client, question, {}) for question in known[::3]]
        contained = [
            any(gold in response.choices[0].text for gold in question.answers)
            for question, response in zip(known[::3], answers, strict=True)
        ]
        assert mean(contained) >= 0.6
        assert mean(map(refused, answers)) <= 0.1
        assert mean(refused(answer(client, question, {})) for question in unknown) >= 0.6

"""Whatever the question is, the query is valid, and means its words."""

import sqlite3
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millrace.retrieval import lexical
from millrace.retrieval.filters import Where
from millrace.retrieval.schema import create_fulltext

EVERYTHING = Where("", ())
TEXTS = ["cats and dogs", "dogs and birds AND fish", "Ünïcode naïve café", "東京 天気", "NEAR OR NOT text : context"]


@pytest.fixture(scope="module")
def db() -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(":memory:")
    create_fulltext(db, 1)
    for label, text in enumerate(TEXTS, start=1):
        db.execute("INSERT INTO fulltext_1 (rowid, text, context) VALUES (?, ?, ?)", (label, text, f"page{label}"))
    yield db
    db.close()


def found(db: sqlite3.Connection, question: str, k: int = 10) -> list[int]:
    return lexical.search(db, 1, question, k, EVERYTHING).labels


@pytest.mark.parametrize(
    ("question", "terms"),
    [
        ("What is the return policy?", ["return", "policy"]),
        ("Who are you?", ["who", "are", "you"]),  # nothing else is left
        ("Don't we'll it's", ["don", "t", "we", "ll", "it", "s"]),
        ('say "NEAR(a b)" OR text:x* ^y -z', ["say", "near", "b", "text", "x", "y", "z"]),
        ("Café cafe\u0301 CAFÉ", ["café", "cafe\u0301"]),
        ("東京の天気は？ 🙂 \0 x_y", ["東京の天気は", "x", "y"]),
        ("🙂 ?! \0 \u0301", []),
        ("वाहन", ["वाहन"]),
    ],
)
def test_terms(question: str, terms: list[str]) -> None:
    assert lexical.terms(question) == terms


def test_no_operator_is_an_operator(db: sqlite3.Connection) -> None:
    assert set(found(db, "birds AND cats")) == {1, 2}  # an AND of both is nowhere
    assert set(found(db, "NOT dogs")) == {1, 2}
    assert set(found(db, "fish NEAR context")) == {2, 5}
    assert found(db, "bir*") == []
    assert found(db, "text: cats") == found(db, "cats text")
    assert set(found(db, "page2")) == {2}


def test_words_match_by_stem_without_case_and_accents(db: sqlite3.Connection) -> None:
    assert found(db, "CAT") == [1]
    assert found(db, "unicode") == found(db, "cafe\u0301") == found(db, "CAFÉ") == [3]
    assert found(db, "天気") == [4]


def test_best_first_and_no_more_than_asked_for(db: sqlite3.Connection) -> None:
    ranked = lexical.search(db, 1, "dogs fish", 10, EVERYTHING)
    assert ranked.labels == [2, 1]
    assert ranked.scores == sorted(ranked.scores, reverse=True)
    assert ranked.scores[-1] > 0
    assert found(db, "cats dogs", k=1) == [1]


def test_equals_by_label() -> None:
    db = sqlite3.connect(":memory:")
    create_fulltext(db, 7)
    db.executemany(
        "INSERT INTO fulltext_7 (rowid, text, context) VALUES (?, 'same words', '')", [(n,) for n in (5, 2, 9)]
    )
    assert lexical.search(db, 7, "same", 2, EVERYTHING).labels == [2, 5]
    db.close()


@given(st.text(max_size=200) | st.text(alphabet="\"*^(){}:-+ \0'\\ANDORNOTEar\u0301é東", max_size=60))
@example('"')
@example("\0")
@example('"" OR ""')
@example("{text context} : x")
@example("\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
def test_no_question_is_an_error(db: sqlite3.Connection, question: str) -> None:
    assert set(found(db, question)) <= set(range(1, len(TEXTS) + 1))


@given(st.lists(st.sampled_from(["cats", "dogs", "birds", "AND", "NOT", '"', "*", "(", "fish"]), max_size=8))
def test_means_any_of_its_words(db: sqlite3.Connection, parts: list[str]) -> None:
    wanted = {word for word in parts if word.isalpha() and word not in ("AND", "NOT")}
    texts = [set(text.split()) for text in TEXTS]
    if wanted:
        assert set(found(db, " ".join(parts))) == {n for n, words in enumerate(texts, start=1) if words & wanted}


def test_long_questions_are_bounded(db: sqlite3.Connection) -> None:
    question = " ".join(f"word{n}" for n in range(1500))[:8192]
    assert lexical.match_expression(question).count(" OR ") == lexical.MAX_TERMS - 1
    assert found(db, question) == []
    assert found(db, "x" * 8192) == []
    assert found(db, "東" * 2700) == []


def test_a_filter_costs_no_search_for_each_label() -> None:
    """FTS5 would take `rowid IN (...)` for as many lookups, each with the whole query: minutes where there are many."""
    db = sqlite3.connect(":memory:")
    create_fulltext(db, 1)
    rows = [(n, f"common words number{n % 7}") for n in range(1, 4001)]
    db.executemany("INSERT INTO fulltext_1 (rowid, text, context) VALUES (?, ?, '')", rows)
    db.execute("CREATE TABLE chosen AS SELECT rowid AS label FROM fulltext_1")
    seconds = []
    for where in (EVERYTHING, Where("SELECT label FROM chosen", ())):
        began = time.perf_counter()
        assert len(lexical.search(db, 1, "common number3", 20, where).labels) == 20
        seconds.append(time.perf_counter() - began)
    assert seconds[1] < 20 * seconds[0] + 0.1
    db.close()

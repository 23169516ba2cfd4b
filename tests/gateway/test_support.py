"""Sentences of sources, and the number that says how well each supports an answer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.retrieval.types import Chunk, Hit
from millrace.server.gateway.support import Coverage, Quote, best_of, candidates, preselect, stem, stems_of, supports
from millrace.server.types import Source


def source(number: int, text: str, byte_start: int = 0, document_id: str = "d", title: str = "") -> Source:
    size = len(text.encode())
    chunk = Chunk(number, f"c{number}", document_id, "d.md", title, byte_start, byte_start + size, text, 0)
    return Source(number, Hit(chunk, 1.0))


def test_sentences_know_where_they_are_and_what_is_near() -> None:
    text = "# Rückgabe\n\nFirst one 😀. Second one!\n\n# Postage\n\nThird."
    found = candidates([source(1, text, byte_start=100, title="Handbook")])
    assert [one.text for one in found] == ["First one 😀.", "Second one!", "Third."]
    for one in found:
        assert text.encode()[one.byte_start - 100 : one.byte_end - 100].decode() == one.text
    assert found[0].readable == "Rückgabe. First one 😀."
    assert stems_of("handbook rückgabe first second") <= found[0].nearby
    assert "handbook" not in found[0].stems
    assert stem("postage") in found[2].nearby
    assert stem("rückgabe") not in found[2].nearby


def test_overlapping_chunks_give_each_sentence_once() -> None:
    text = "One is here. Two is a longer one. Three."
    cut, again = text.index(" longer"), text.index("Two")
    found = candidates([source(1, text[:cut]), source(2, text[again:], again)])
    assert [(one.source.number, one.text) for one in found] == [
        (1, "One is here."), (2, "Two is a longer one."), (2, "Three."),
    ]  # fmt: skip
    other = candidates([source(1, "Same words."), source(2, "Same words.", document_id="e")])
    assert [one.source.number for one in other] == [1], "the same text of another document says nothing new"
    assert len(candidates([source(1, "Mug."), source(2, "Kettle.", document_id="e")])) == 2


def test_what_has_no_content_word_is_no_answer() -> None:
    text = "| Item | Price |\n|:---|---:|\n| Mug | £4 |\n| | |\n| 7 | 9 |\n\n---\n\n___\n\n***\n\nWhat is it? £3.95."
    found = candidates([source(1, text)])
    assert [one.text for one in found] == ["| Item | Price |", "| Mug | £4 |", "| 7 | 9 |", "£3.95."]


@pytest.mark.parametrize(
    ("scores", "limit", "left"),
    [
        ([], 3, []),
        ([0.0], 3, [0.0]),
        ([1.0, 0.75, 0.74], 3, [1.0, 0.75]),
        ([0.8, 0.7, 0.65], 2, [0.8, 0.7]),
        ([0.5, 0.37], 3, [0.5]),
    ],
)
def test_fillers_are_left_out(scores: list[float], limit: int, left: list[float]) -> None:
    candidate = candidates([source(1, "One.")])[0]
    assert [quote.score for quote in best_of([Quote(candidate, score) for score in scores], limit)] == left


def test_coverage_is_the_weighted_share_of_the_questions_words() -> None:
    texts = [stems_of(text) for text in ("red kettle", "blue kettle", "green kettle", "red mug")]
    coverage = Coverage("Is the kettle red?", texts)
    rare, common = math.log1p(2.5 / 2.5), math.log1p(1.5 / 3.5)
    assert coverage.of(stems_of("Kettles!")) == pytest.approx(common / (rare + common))
    assert coverage.of(stems_of("red")) == pytest.approx(rare / (rare + common))
    assert coverage.of(stems_of("reddish mugs")) == 0
    assert coverage.of(stems_of("a red kettle")) == 1
    assert Coverage("Who is it?", texts).of(stems_of("anything")) == 0, "no content words"


def test_support_adds_up() -> None:
    found = candidates([source(1, "# Kettles\n\nRed ones return. Others stay.")])
    scores = supports("return kettles", found, [0.5, -0.3])
    stems = [one.stems for one in found]
    own = Coverage("return kettles", stems).of(stems[0])
    assert 0 < own < 1
    assert scores[0] == pytest.approx(0.7 * 0.5 + 0.15 * own + 0.15)
    assert scores[1] == pytest.approx(0.15)


@given(
    question=st.text("abc kettle?", max_size=20),
    texts=st.lists(st.text("abc kettle.\n#", min_size=1, max_size=40), min_size=1, max_size=5),
    data=st.data(),
)
def test_support_is_within_bounds(question: str, texts: list[str], data) -> None:
    found = candidates([source(number, text, document_id=str(number)) for number, text in enumerate(texts, 1)])
    similarities = [data.draw(st.floats(-1.1, 1.1)) for _ in found]
    assert all(0 <= score <= 1 + 1e-9 for score in supports(question, found, similarities))


def test_preselection_keeps_what_covers_the_question_and_the_order() -> None:
    filler = " ".join(f"Filler number{i} here." for i in range(100))
    found = candidates([source(1, f"{filler} The kettle returns. {filler.replace('Filler', 'More')}")])
    assert len(found) == 201
    kept = preselect("kettle returns", found, 10)
    assert len(kept) == 10
    assert "The kettle returns." in [one.text for one in kept]
    assert [found.index(one) for one in kept] == sorted(found.index(one) for one in kept)
    assert preselect("kettle", found[:10], 10) == found[:10]


@pytest.mark.parametrize(
    "forms",
    [
        "return returns returned returning", "delivery deliveries", "stop stops stopped stopping",
        "charge charges charged charging", "pass passes passed", "city cities", "wrap wrapped", "quick quickly",
    ],
)  # fmt: skip
def test_forms_of_a_word_have_one_stem(forms: str) -> None:
    assert len({stem(form) for form in forms.split()}) == 1


def test_different_words_stay_different() -> None:
    words = [
        "kettle",
        "mug",
        "plate",
        "address",
        "dress",
        "class",
        "gas",
        "bus",
        "ring",
        "red",
        "reed",
        "14:00",
        "£3.95",
        "naïve",
    ]
    assert len({stem(word) for word in words}) == len(words)

"""The example knowledge base is sound: its pages can be read, and its questions have the answers they name."""

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pypdf import PdfReader

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGES = sorted((EXAMPLES / "docs").iterdir())
QUESTIONS = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
ANSWERABLE = [question for question in QUESTIONS if question["document"] is not None]
HIDDEN = {"head", "style", "script"}
EMAIL = re.compile(r"[\w.+-]+@([\w-]+(?:\.[\w-]+)+)")
PHONE = re.compile(r"\+?\d[\d ]{8,}\d")
LINK = re.compile(r"\]\(([^):#]+)\)|href=\"([^:\"]+)\"")


class Visible(HTMLParser):
    """Collects the text that a reader of the page sees, one piece between two tags at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)


@cache
def text_of(page: Path) -> str:
    """The text of a page without the markup of HTML and PDF; Markdown and plain text are themselves."""
    if page.suffix == ".pdf":
        return "\n".join(sheet.extract_text() for sheet in PdfReader(page).pages)
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".html":
        return text
    visible = Visible()
    visible.feed(text)
    visible.close()
    return "".join(visible.pieces)


def test_there_are_about_twenty_pages_of_four_kinds() -> None:
    assert 18 <= len(PAGES) <= 24
    assert {page.suffix for page in PAGES} == {".md", ".html", ".txt", ".pdf"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path) -> None:
    text = text_of(page)
    assert 250 <= len(text.split()) <= 700, "a page is short enough to read and long enough to be cut into chunks"
    assert page.stat().st_size <= 30_000
    assert all(domain.endswith(".example") for domain in EMAIL.findall(text)), "no address of a real person"
    assert all(number.startswith("+44 20 7946 0") for number in PHONE.findall(text)), "only numbers kept for fiction"
    if page.suffix != ".pdf":
        for link in filter(None, sum(LINK.findall(page.read_text(encoding="utf-8")), ())):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("question", ANSWERABLE, ids=lambda question: question["question"])
def test_answer_is_in_its_document_once(question: dict[str, str]) -> None:
    page = EXAMPLES / "docs" / question["document"]
    assert question["answer"].strip()
    assert text_of(page).count(question["answer"]) == 1


def test_questions() -> None:
    assert len({question["question"].casefold() for question in QUESTIONS}) == len(QUESTIONS)
    assert all(question["question"].strip().endswith("?") for question in QUESTIONS)
    assert all(
        question.keys() == ({"question", "document", "answer"} if question["document"] else {"question", "document"})
        for question in QUESTIONS
    )
    documents = [question["document"] for question in ANSWERABLE]
    assert all(documents.count(page.name) >= 2 for page in PAGES), "every page is asked about"
    assert (len(ANSWERABLE), len(QUESTIONS)) == (60, 80)

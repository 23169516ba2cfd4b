"""Lines and headings of Markdown, compared with markdown-it where both read the same."""

import itertools
import random

import pytest
from markdown_it import MarkdownIt

from millrace.retrieval.parsing.markdown import Kind, first_heading, headings, lines


def titles(text: str) -> list[tuple[int, str]]:
    return [(heading.level, heading.title) for heading in headings(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# One\n## Two ##\n###\n####### no\n#no\n    # code\n", [(1, "One"), (2, "Two"), (3, "")]),
        ("# C#\n# F #\n", [(1, "C#"), (1, "F")]),
        ("One\n===\n\nTwo\n---\n\n---\n\n- a\n---\n", [(1, "One"), (2, "Two")]),
        ("```sh\n# no\n```\n~~~\n# no\n```\n# no\n~~~\n# Yes\n", [(1, "Yes")]),
        ("````\n```\n# no\n````\n# Yes\n", [(1, "Yes")]),
        ("``` not `a fence\n# Yes\n", [(1, "Yes")]),
        ("```\n# unclosed", []),
        ("# **Bold** [link](x) ![p](y) `code`\r\n# CR\r# LF\n", [(1, "Bold link p code"), (1, "CR"), (1, "LF")]),
        ("---\ntitle: x\nother: y\n---\n# Yes\n", [(1, "Yes")]),
        ("---\n\n# Yes\n\n---\n# Too\n", [(1, "Yes"), (1, "Too")]),
        ("", []),
    ],
)
def test_headings(text: str, found: list[tuple[int, str]]) -> None:
    assert titles(text) == found


def test_first_heading() -> None:
    assert first_heading("text\n## A\n# B") == "A"
    assert first_heading("text") == ""


def test_headings_begin_where_they_say() -> None:
    text = "a 👋\n\n  ## Two\n\nThree\n=====\n"
    assert [text[heading.start :].split("\n")[0] for heading in headings(text)] == ["  ## Two", "Three"]


def test_lines_are_all_of_the_text_but_line_ends() -> None:
    random_ = random.Random(3)
    for _ in range(500):
        text = "".join(random_.choices(["\n", "\r\n", "\r", " ", "a", "# ", "```", "- ", "| ", "---", "==="], k=30))
        position = 0
        for line in lines(text):
            assert not text[position : line.start].strip()
            position = line.end
        assert not text[position:].strip("\r\n")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("- a", Kind.ITEM),
        ("* a", Kind.ITEM),
        ("12. a", Kind.ITEM),
        ("(b) a", Kind.ITEM),
        ("• a", Kind.ITEM),
        ("-a", Kind.TEXT),
        ("1984. a", Kind.TEXT),
        ("| a |", Kind.ROW),
        ("* * *", Kind.BREAK),
        ("___", Kind.BREAK),
        (" \t ", Kind.BLANK),
    ],
)
def test_kind(line: str, kind: Kind) -> None:
    assert next(lines(line)).kind is kind


def test_headings_are_those_of_markdown_it() -> None:
    random_ = random.Random(4)
    blocks = [
        "# A b\n",
        "## C #\n",
        "text\nmore\n\n",
        "One\n===\n",
        "\nTwo\n---\n",
        "```\n# no\n```\n",
        "~~~\nx\n~~~\n",
        "\n",
    ]
    for _ in range(300):
        text = "\n".join(random_.choices(blocks, k=12))
        tokens = MarkdownIt("commonmark").parse(text)
        expected = [
            (int(token.tag[1]), after.content)
            for token, after in itertools.pairwise(tokens)
            if token.type == "heading_open"
        ]
        assert titles(text) == expected, text

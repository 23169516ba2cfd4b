"""Markers in what a model writes: which stay, which go, where they stand, whatever the chunking."""

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.server.text.citations import CitationMarkers, Marked, Places
from millrace.server.text.holdback import Piece, Pipeline


def run(text: str, sources: int = 3, cuts: Sequence[int] = (), masks: bool = False) -> tuple[str, list[Marked]]:
    """The output and the markers in it, in bytes; `masks` also replaces every `é` and `😀`."""
    markers = CitationMarkers(sources)
    places = Places(markers, Mask() if masks else None)
    pipeline = Pipeline([markers, places])
    edges = sorted({0, len(text), *cuts})
    done = [pipeline.push(text[start:end]) for start, end in pairwise(edges)] + [pipeline.push("", last=True)]
    assert sum(settled for _, settled in done) == len(text), "every character is accounted for"
    assert not markers.found
    return "".join(part for part, _ in done), list(places.found)


class Mask:
    """Turns `é` and `😀`, once the next character is known, into masks, written as the guard writes its own."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, text: str) -> list[Piece]:
        text, self.held = self.held + text, text[-1:]
        return [piece for character in text[:-1] for piece in self.masked(character)]

    def finish(self) -> list[Piece]:
        held, self.held = self.held, ""
        return [piece for character in held for piece in self.masked(character)]

    def masked(self, character: str) -> list[Piece]:
        mask = {"é": "[MÄSK]", "😀": "!!"}.get(character)
        return [Piece(mask[:-1], 0), Piece(mask[-1], 1)] if mask else [Piece(character, 1)]


@pytest.mark.parametrize(
    ("text", "kept", "numbers"),
    [
        ("Two days [1].", "Two days [1].", [1]),
        ("Two days[1].", "Two days[1].", [1]),
        ("Both [1][3].", "Both [1][3].", [1, 3]),
        ("Both [1, 3] and [2,3].", "Both [1, 3] and [2,3].", [1, 3, 2, 3]),
        ("Twice [2, 2].", "Twice [2, 2].", [2]),
        ("Invented [4].", "Invented.", []),
        ("Invented [999], really.", "Invented, really.", []),
        ("Invented[7]!", "Invented!", []),
        ("Half [1, 9].", "Half [1].", [1]),
        ("Half [9,2,8,3].", "Half [2, 3].", [2, 3]),
        ("Two [9] [8] gone", "Two gone", []),
        ("  [9]", " ", []),
        ("array[0] and [00] and [01]", "array[0] and [00] and [01]", []),
        ("in [1990] he said [note] [a1] [1a] [-1] [1.5]", "in [1990] he said [note] [a1] [1a] [-1] [1.5]", []),
        ("[ 1 ] [1 ,2] [1,  2] [1,] [,1] []", "[ 1 ] [1 ,2] [1,  2] [1,] [,1] []", []),
        ("open [1", "open [1", []),
        ("open [1, ", "open [1, ", []),
        ("[[1]] [1[2]", "[[1]] [1[2]", [1, 2]),
        ("[1](http://x)", "[1](http://x)", [1]),
        ("١ [١]", "١ [١]", []),
    ],
)
def test_markers(text: str, kept: str, numbers: list[int]) -> None:
    output, found = run(text)
    assert output == kept
    assert [number for one in found for number in one.numbers] == numbers
    for one in found:
        marker = output.encode()[one.start : one.end].decode()
        assert tuple(dict.fromkeys(map(int, re.findall("[0-9]+", marker)))) == one.numbers
        assert re.fullmatch(r"\[.*\]", marker)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("[9[8]9]", "[99"),
        ("[1[9]]", "[1"),
        ("a [9, [8]9] b", "a [9,9 b"),
        ("[[9]7[8]]", "[7"),
        ("[9[8][7]9]", "[99"),
        (" [9[9]]] a]", " [9 a]"),
    ],
)
def test_no_removal_puts_a_marker_together(text: str, kept: str) -> None:
    assert run(text) == (kept, [])


def test_fifty_numbers_are_a_marker_and_more_are_text() -> None:
    fifty = "[" + ",".join(map(str, range(1, 51))) + "]"
    assert [one.numbers for one in run(fifty, 50)[1]] == [tuple(range(1, 51))]
    more = fifty[:-1] + ",51]"
    assert run(more, 50) == (more, [])


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("It takes two days [1].", ["It takes two days"]),
        ("It takes two days. [1]", ["It takes two days."]),
        ("It takes two days [1]. The rest takes three [2].", ["It takes two days", "The rest takes three"]),
        ("It costs 3.95 pounds [1, 3][2]", ["It costs 3.95 pounds"] * 2),
        ("One thing\n- another [1]", ["another"]),
        ("Gone [9] and kept [1]", ["Gone and kept"]),
        ("[1]", [""]),
    ],
)
def test_the_statement_that_a_marker_is_about(text: str, statements: list[str]) -> None:
    assert [one.statement for one in run(text)[1]] == statements


texts = st.lists(
    st.sampled_from(["[1]", "[9]", "[1, 9]", " [", "[", "]", ",", " ", "1", "9", "0", "é", "😀", "word", ". ", "[2"]),
    max_size=14,
).map("".join)
ANY_MARKER = re.compile(r"\[([1-9][0-9]{0,2}(?:, ?[1-9][0-9]{0,2})*)\]")


@settings(max_examples=400, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(0, 60), max_size=8), masks=st.booleans())
def test_chunking_changes_nothing_and_no_marker_is_invented(text: str, cuts: list[int], masks: bool) -> None:
    cuts = [cut for cut in cuts if cut < len(text)]
    output, found = run(text, 3, cuts, masks)
    assert (output, found) == run(text, 3, (), masks)
    assert (output, found) == run(text, 3, range(len(text)), masks)
    if masks:
        assert output == run(text)[0].replace("é", "[MÄSK]").replace("😀", "!!")
    named = [int(number) for group in ANY_MARKER.findall(output) for number in group.split(",")]
    assert all(1 <= number <= 3 for number in named)
    starts = {one.start for one in found}
    assert {len(output[: match.start()].encode()) for match in ANY_MARKER.finditer(output)} == starts


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_what_is_held_is_bounded_and_may_begin_a_marker(text: str) -> None:
    stage = CitationMarkers(3)
    sent = 0
    for seen, character in enumerate(text, 1):
        sent += sum(piece.source for piece in stage.push(character))
        held = text[sent:seen]
        assert re.fullmatch(r" ?(\[([1-9][0-9]{0,2}, ?)*([1-9][0-9]{0,2})?)?", held)

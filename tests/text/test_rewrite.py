"""A whole text through a stage, and where its parts are afterwards."""

from hypothesis import given
from hypothesis import strategies as st

from millrace.server.text.holdback import Piece, Rewritten, rewrite
from millrace.server.text.stops import StopMatcher


class Shout:
    """Replaces `ab` by `<AB>`, in two pieces, the first of which stands for nothing; deletes `-`."""

    def push(self, text: str) -> list[Piece]:
        pieces, i = [], 0
        while i < len(text):
            if text.startswith("ab", i):
                pieces += [Piece("<AB", 0), Piece(">", 2)]
                i += 2
            else:
                pieces.append(Piece("" if text[i] == "-" else text[i], 1))
                i += 1
        return pieces

    def finish(self) -> list[Piece]:
        return []


def test_parts_keep_their_places() -> None:
    done = rewrite(Shout(), "x ab-y ab")
    assert done.text == "x <AB>y <AB>"
    assert done.place(0, 9) == (0, 12)
    assert [done.text[slice(*done.place(*span))] for span in [(0, 1), (2, 4), (4, 6), (5, 6), (7, 9), (4, 5)]] == [
        "x", "<AB>", "y", "y", "<AB>", "",
    ]  # fmt: skip
    assert done.text[slice(*done.place(3, 6))] == "<AB>y", "what is replaced in part counts whole"
    assert done.text[slice(*done.place(0, 3))] == "x <AB>"
    assert done.place(0, 0) == (0, 0)


@given(parts=st.lists(st.text("ab-y", max_size=4), max_size=6))
def test_a_part_becomes_what_it_becomes_alone(parts: list[str]) -> None:
    """Parts here are joined by a character that no replacement reaches over."""
    done, start = rewrite(Shout(), "|".join(parts)), 0
    for part in parts:
        span = done.place(start, start + len(part))
        assert done.text[slice(*span)] == rewrite(Shout(), part).text
        start += len(part) + 1


def test_the_end_of_the_text_at_a_stop_string() -> None:
    matcher = StopMatcher(["stop"])
    assert rewrite(matcher, "go on, stop here") == Rewritten("go on, ", [Piece("go on, ", 7)])
    assert matcher.matched == "stop"

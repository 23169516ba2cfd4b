"""The stop matcher against a naive search, and how much it may hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.server.text.stops import StopMatcher

STOPS = st.lists(st.text("ab☃", min_size=1, max_size=5), min_size=1, max_size=8).map(tuple)


def earliest(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """End of the match that ends first, and the longest stop string that ends there."""
    for end in range(len(text) + 1):
        if matching := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(matching, key=len)
    return None


@settings(max_examples=300, deadline=None)
@given(chunks=st.lists(st.text("ab☃c", max_size=6), max_size=10), stops=STOPS, include=st.booleans())
def test_against_a_naive_search(chunks, stops, include):
    matcher, sent, read = StopMatcher(stops, include), "", ""
    for chunk in chunks:
        pieces = matcher.push(chunk)
        assert all(len(piece.text) == piece.source for piece in pieces)
        sent += "".join(piece.text for piece in pieces)
        read += chunk
        if (found := earliest(read, stops)) is not None:
            end, stop = found
            assert (matcher.matched, sent) == (stop, read[: end if include else end - len(stop)])
            assert matcher.push("more") == matcher.finish() == []
            return
        held = next(n for n in range(6, -1, -1) if any(s[:n] == read[-n:] for s in stops if n < len(s)) or n == 0)
        assert (matcher.matched, sent) == (None, read[: len(read) - held])
    assert sent + "".join(piece.text for piece in matcher.finish()) == read


class CountingDict(dict):
    lookups = 0

    def __contains__(self, key):
        CountingDict.lookups += 1
        return super().__contains__(key)


def test_work_is_linear_in_the_text():
    """`aaa…ab` on `aaaa…` is where a matcher that starts again at each character takes quadratic work."""
    matcher = StopMatcher(["a" * 63 + "b", "a" * 62 + "c"])
    matcher._states = [state._replace(next=CountingDict(state.next)) for state in matcher._states]
    CountingDict.lookups = 0
    for _ in range(100):
        matcher.push("a" * 100)
    assert CountingDict.lookups <= 2 * 10_000


def test_an_empty_stop_string_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])

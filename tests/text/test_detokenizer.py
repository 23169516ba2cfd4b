"""The incremental detokenizer against a decode of the whole."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.server.text.detokenizer import Detokenizer

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
RAW = [
    b"\xf0\x9f\x98\x80",
    b"\xed\xa0\x80",
    b"\xf0\x9f",
    b"\xc3",
    b"\xc3\xa9",
    b"\xef\xbf\xbd",
    b"\xe0\x80",
    b"\xff",
    b" ",
    b"a",
]


def ids_of_bytes(tokenizer, data: bytes) -> list[int]:
    single = {tokenizer.token_bytes(id): id for id in reversed(range(tokenizer.vocab_size))}
    return [single[data[i : i + 1]] for i in range(len(data)) if data[i : i + 1] in single]


def sequences(tokenizer):
    """Random ids, ids of text, and bytes one by one: emoji, combining marks, surrogates, cut-off characters."""
    random_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=20)
    texts = st.text(max_size=10).map(tokenizer.encode)
    raw = st.lists(st.sampled_from(RAW), max_size=6).map(lambda parts: ids_of_bytes(tokenizer, b"".join(parts)))
    return st.lists(random_ids | texts | raw, max_size=4).map(lambda parts: [id for part in parts for id in part])


@relaxed
@given(data=st.data())
def test_joined_pieces_equal_the_whole_decode(tokenizer, data):
    ids = data.draw(sequences(tokenizer))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(id) for id in ids]
    assert "".join(piece.text for piece in pieces) + detokenizer.finish() == tokenizer.decode(ids)


@relaxed
@given(data=st.data())
def test_every_prefix_is_as_long_as_it_can_be(tokenizer, data):
    """What a push has not given out is at most one character, and one that the next byte may still decide."""
    ids = data.draw(sequences(tokenizer))
    detokenizer, text = Detokenizer(tokenizer), ""
    for i, id in enumerate(ids):
        text += detokenizer.push(id).text
        whole = tokenizer.decode(ids[: i + 1])
        assert whole in (text, text + "\ufffd")


@relaxed
@given(data=st.data())
def test_spans_say_which_characters_a_token_has_bytes_in(tokenizer, data):
    """Against a naive oracle: changing a token's bytes can only change characters of its span."""
    ids = data.draw(sequences(tokenizer))
    detokenizer = Detokenizer(tokenizer, continues=True)
    spans = [detokenizer.push(id)[1:] for id in ids]
    kept = [b"" if id in tokenizer.special_ids else tokenizer.token_bytes(id) for id in ids]
    owners = characters_of_bytes(b"".join(kept))
    position = 0
    for (start, end), piece in zip(spans, kept, strict=True):
        if piece:
            owned = owners[position : position + len(piece)]
            assert (start, end) == (owned[0], owned[-1] + 1)
        else:
            assert start <= end
        position += len(piece)


def characters_of_bytes(data: bytes) -> list[int]:
    """Which character of the decoded whole each byte belongs to."""
    text, owners = data.decode("utf-8", "replace"), []
    for i in range(len(data)):
        before = data[:i].decode("utf-8", "replace")
        # A byte that goes on a cut-off character leaves the number of characters as it is.
        goes_on = len(data[: i + 1].decode("utf-8", "replace")) == len(before)
        owners.append(len(before) - goes_on)
    assert not owners or owners[-1] == len(text) - 1
    return owners


def test_a_continuation_keeps_its_leading_space(tokenizers):
    for family in ("byte_fallback", "unigram"):
        tokenizer = tokenizers[family]
        ids = tokenizer.encode("mill", add_special_tokens=False)
        texts = {}
        for continues in (False, True):
            detokenizer = Detokenizer(tokenizer, continues)
            texts[continues] = "".join(detokenizer.push(id).text for id in ids) + detokenizer.finish()
        assert texts == {False: "mill", True: " mill"}


def test_an_emoji_in_four_tokens_comes_out_with_the_last(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    detokenizer = Detokenizer(tokenizer)
    ids = ids_of_bytes(tokenizer, "😀".encode())
    assert [detokenizer.push(id) for id in ids] == [("", 0, 1), ("", 0, 1), ("", 0, 1), ("😀", 0, 1)]

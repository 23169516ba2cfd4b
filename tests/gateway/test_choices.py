"""How an answer is cut into messages, without a gateway around it."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.server.config import BUILTIN
from millrace.server.gateway.choices import Choices
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import (
    ChoiceDelta,
    Finish,
    FinishReason,
    GenerateRequest,
    Logprobs,
    OutputOptions,
    StoppingCriteria,
    TokenDelta,
)

TOKENIZER = Tokenizer.load(BUILTIN)


def answer(
    tokens: list[int], stopping: StoppingCriteria, output: OutputOptions, pushes: list[int]
) -> list[list[ChoiceDelta]]:
    """The deltas of each push of so many tokens; what is left comes with the finish."""
    request = GenerateRequest("m", "p", stopping=stopping, output=output)
    choices = Choices(TOKENIZER, request, 1, FinishReason.MAX_TOKENS)
    messages = []
    starts = [start for start in accumulate(pushes, initial=0) if start < len(tokens)]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        ids = tokens[start:end]
        finish = Finish(FinishReason.MAX_TOKENS) if end == len(tokens) else None
        logprobs = Logprobs(0, [-float(id) for id in ids]) if output.logprobs_top_n is not None else None
        news = TokenDelta(0, ids, logprobs, finish)
        messages.append([delta for deltas in choices.push([news]) for delta in deltas.choices])
    assert choices.usage.output_tokens == sum(len(d.token_ids) for m in messages for d in m) or not output.token_ids
    return messages


def joined(messages: list[list[ChoiceDelta]]) -> tuple[str, list[int], list[float], Finish | None]:
    deltas = [delta for message in messages for delta in message]
    ids = [id for delta in deltas for id in delta.token_ids]
    logprobs = [value for delta in deltas if delta.logprobs for value in delta.logprobs.sampled]
    assert [bool(delta.finish) for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return "".join(delta.text for delta in deltas), ids, logprobs, deltas[-1].finish


letters = st.sampled_from("ab é😀\n")


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(letters, min_size=1, max_size=30),
    extra=st.lists(st.tuples(st.integers(0, 30), st.integers(0, TOKENIZER.vocab_size - 1)), max_size=3),
    stops=st.lists(st.text(letters, min_size=1, max_size=12), max_size=3),
    pushes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    limit=st.integers(1, 4),
    include_stop=st.booleans(),
)
def test_a_message_holds_its_tokens_and_their_text(text, extra, stops, pushes, limit, include_stop) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    for place, id in extra:  # special tokens and broken characters among them
        tokens.insert(place, id)
    stopping = StoppingCriteria(stop_strings=tuple(stops), include_stop=include_stop)
    whole = answer(tokens, stopping, OutputOptions(token_ids=True, logprobs_top_n=0), [len(tokens)])
    output = OutputOptions(token_ids=True, logprobs_top_n=0, max_tokens_per_message=limit)
    split = answer(tokens, stopping, output, pushes)
    assert joined(split) == joined(whole)
    sent_text, sent_ids = "", []
    for deltas in split:
        for delta in deltas:
            assert delta.token_offset == len(sent_ids)
            assert len(delta.token_ids) == len(delta.logprobs.sampled) <= limit
            sent_text, sent_ids = sent_text + delta.text, sent_ids + delta.token_ids
            # Never a token before its text, nor more text than the token to come has.
            if delta.finish is None:
                assert sent_text.startswith(plain(sent_ids))
                assert len(sent_text) <= len(decode(tokens[: len(sent_ids) + 1]))
            if deltas is not split[-1] and delta is not deltas[-1] and "\ufffd" not in sent_text:
                assert len(sent_text) <= len(decode(sent_ids)), "text of tokens in the next message"


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def plain(ids: list[int]) -> str:
    """Without a character that is not complete."""
    return decode(ids).rstrip("\ufffd")


@pytest.mark.parametrize("token_ids", [False, True])
def test_text_that_was_held_goes_out_with_its_tokens(token_ids: bool) -> None:
    text = "a stop string that is almost there, and goes on"
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    stopping = StoppingCriteria(stop_strings=(text[:-1] + "?",))
    output = OutputOptions(token_ids=token_ids, max_tokens_per_message=1)
    *deltas, last = [delta for message in answer(tokens, stopping, output, [1] * len(tokens)) for delta in message]
    assert [delta.text for delta in deltas] == [TOKENIZER.decode([id]) for id in tokens]
    assert [delta.token_offset for delta in deltas] == list(range(len(tokens)))
    assert (last.text, last.token_ids, last.token_offset) == ("", [], len(tokens))


def test_a_token_without_text_leaves_no_gap() -> None:
    tokens = [*TOKENIZER.encode("one 😀", add_special_tokens=False), *TOKENIZER.special_ids]
    output = OutputOptions(max_tokens_per_message=1)
    *deltas, _ = [delta for message in answer(tokens, StoppingCriteria(), output, [100]) for delta in message]
    assert [delta.token_offset for delta in deltas] == list(range(len(tokens)))
    assert deltas[-1].text == ""

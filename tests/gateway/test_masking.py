"""Personal data: none of it reaches library, embedder, model, log or client."""

import asyncio
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.server.errors import FeatureUnsupported
from millrace.server.gateway.collect import collect
from millrace.server.gateway.guardrails.pii import PIIGuard
from millrace.server.gateway.masking import masked_request
from millrace.server.types import (
    AnswerMode,
    ChatPrompt,
    Deltas,
    Finish,
    FinishReason,
    Message,
    OutputOptions,
    RetrievalOptions,
    Role,
    SamplingParams,
    StoppingCriteria,
)

MAIL, CARD = "jane.doe@example.com", "4111 1111 1111 1111"
PARTS = [MAIL, CARD, "[1]", "[9]", " wörd ", "jane@", "4111 ", "😀", ". "]


@pytest.fixture(params=["request", "server"])
def masking(request, house, builtin_card):
    """What to give a request so that it is masked: its own wish, or nothing on a server that masks everybody's."""
    if request.param == "request":
        return {"mask_pii": True}
    house.gateway.close()
    house.gateway = house.build(builtin_card, mask_pii=True)
    return {}


async def test_prompt_and_answer(house, ask, masking, logs) -> None:
    house.say(f"Write to {MAIL} or pay with {CARD}, thanks.")
    answer = await house.run(ask(f"I am {MAIL}.", **masking))
    assert answer.choices[0].text == "Write to [EMAIL] or pay with [CARD], thanks."
    assert house.tokenizer.decode(house.backend.requests[-1].prompt_ids) == "I am [EMAIL]."
    assert house.metric("millrace_pii_masked_total", category="email") == 2
    assert house.metric("millrace_pii_masked_total", category="card") == 1
    assert MAIL not in str(logs)


async def test_without_it_nothing_changes(house, ask) -> None:
    house.say(f"Write to {MAIL}.")
    assert (await house.run(ask(MAIL))).choices[0].text == f"Write to {MAIL}."
    assert house.tokenizer.decode(house.backend.requests[-1].prompt_ids) == MAIL


async def test_every_message_of_a_conversation(house, ask, masking) -> None:
    chat = ChatPrompt([Message(Role.SYSTEM, f"Call {MAIL}"), Message(Role.USER, f"or {MAIL}", name=MAIL)])
    await house.run(ask(chat, **masking))
    prompt = house.tokenizer.decode(house.backend.requests[-1].prompt_ids)
    assert MAIL not in prompt
    assert prompt.count("[EMAIL]") == 2


async def test_names_of_speakers(house, ask) -> None:
    chat = ChatPrompt([Message(Role.USER, "hi", name=MAIL)])
    assert masked_request(ask(chat), house.gateway._guard).prompt.messages[0].name == "[EMAIL]"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": (1, 2)}, "token_ids"),
        ({"output": OutputOptions(token_ids=True)}, "output.token_ids"),
        ({"output": OutputOptions(logprobs_top_n=0)}, "output.logprobs"),
        ({"output": OutputOptions(prompt_token_ids=True)}, "output.prompt_token_ids"),
    ],
)
async def test_what_carries_text_past_the_mask_is_refused(house, ask, masking, fields, field: str) -> None:
    with pytest.raises(FeatureUnsupported) as caught:
        await house.events(ask(**fields, **masking))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert not house.backend.requests


@pytest.mark.parametrize("mode", AnswerMode)
async def test_documents(house, roomy, ask, masking, mode: AnswerMode) -> None:
    """The question is masked before it is searched for; sources and answer show no personal data; ranges are right."""
    house.shelf.add("staff", f"Naïve help comes from {MAIL} daily. Pay the help desk with {CARD} only.", page=3)
    house.say(f"Ask {MAIL} for help [1].")
    options = RetrievalOptions("shop", query=f"help {MAIL}", answer_mode=mode, min_support=0.1)
    answer = await house.run(ask(f"Who helps {MAIL}?", retrieval=options, **masking))
    assert house.shelf.requests[-1].text == "help [EMAIL]"
    text = answer.choices[0].text.encode()
    assert b"[EMAIL]" in text
    shown = str(answer)
    assert MAIL not in shown
    assert CARD not in shown
    for request in house.backend.requests:
        assert MAIL not in house.tokenizer.decode(request.prompt_ids)
    for one in answer.citations:
        quoted = house.shelf.documents["staff"][one.byte_start : one.byte_end].decode()
        cited = text[one.text_start : one.text_end].decode()
        assert cited == (f"{PIIGuard().mask(quoted)} [1]" if mode is AnswerMode.EXTRACTIVE else "[1]")
    assert len(answer.citations) == (2 if mode is AnswerMode.EXTRACTIVE else 1)
    shown_in = 2 if mode is AnswerMode.EXTRACTIVE else 1
    assert house.metric("millrace_pii_masked_total", category="card") == shown_in, "the source, and what quotes it"


SECRETS = {
    "[CARD]": "4111 1111 1111 1111",
    "[SSN]": "123-45-6789",
    "[PHONE]": "+1 415 555 2671",
    "[EMAIL]": "QQQQ.Q.QQQ@QQQQ-QQQQQQ.QQ",
}
LETTERS_OF_SECRETS = re.compile("[0-9Q@+]")
WORDS = "the customer pays by card for a kettle refund "


def leaks(text: str) -> list[str]:
    return LETTERS_OF_SECRETS.findall(re.sub(r" \[\d\]", "", text))


async def test_a_card_across_the_cut_of_a_long_sentence(house, ask) -> None:
    """A sentence without an end is cut at 1000 bytes; the marker must not part a number from its rest."""
    text = (WORDS * 30)[:987] + "card 4111 1111 1111 1111 was" + WORDS
    house.shelf.add("a", text)
    options = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, min_support=0)
    answer = await house.run(ask("customer card refund payment", retrieval=options, mask_pii=True))
    assert "[CARD]" in answer.choices[0].text
    assert not leaks(answer.choices[0].text)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    mask=st.sampled_from(sorted(SECRETS)),
    before=st.integers(930, 1010) | st.integers(0, 40) | st.integers(1200, 1300),
    edges=st.sets(st.integers(-30, 40), max_size=3),
    end=st.none() | st.integers(-40, -1),
    letter=st.sampled_from(["e", "é", "🫖"]),
    mode=st.sampled_from(AnswerMode),
)
def test_no_piece_of_a_secret(house, roomy, ask, mask, before, edges, end, letter, mode) -> None:
    """Wherever it stands to the ends of sentences and of chunks, only its mask is shown."""
    filler = list((WORDS * 30)[:before].replace("e", letter))
    if end is not None and -end < len(filler) - 1:
        filler[end - 1 : end] = ". The "
    left = "".join(filler) + " "
    text = f"{left}{SECRETS[mask]} was used by the customer for a refund of the kettle"
    places = sorted({len(left) + edge for edge in edges} & set(range(1, len(text))))
    house.shelf.chunks.clear()
    house.shelf.add("a", text, places)
    house.backend.requests.clear()
    options = RetrievalOptions("shop", answer_mode=mode, min_support=0, max_sentences=9, top_k=9)
    answer = asyncio.run(house.run(ask("the customer card refund was used by a", retrieval=options, mask_pii=True)))
    quotes = "".join(choice.text for choice in answer.choices) if mode is AnswerMode.EXTRACTIVE else ""
    assert not leaks(quotes)
    shown = [one.hit.chunk for one in answer.started.sources]
    assert not leaks("".join(chunk.text for chunk in shown))
    first = len(left.encode())
    last = first + len(SECRETS[mask].encode())
    for chunk in shown:
        assert (mask in chunk.text) == (chunk.byte_start < last and first < chunk.byte_end)
    for one in answer.citations if mode is AnswerMode.EXTRACTIVE else ():
        cited = quotes.encode()[one.text_start : one.text_end].decode()
        assert (mask in cited) == (one.byte_start < last and first < one.byte_end)
    for request in house.backend.requests:
        prompt, secret = house.tokenizer.decode(request.prompt_ids), SECRETS[mask]
        assert not [secret[i : i + 5] for i in range(len(secret) - 4) if secret[i : i + 5] in prompt]


@pytest.mark.parametrize("mode", AnswerMode)
async def test_names_and_metadata_of_sources(house, roomy, ask, mode: AnswerMode) -> None:
    """All but the id, by which a document can be read, and the keys."""
    house.shelf.add("a", "Help comes daily.")
    metadata = {"who": MAIL, "all": ("x", MAIL), "n": 1.0, "b": True}
    chunk = replace(house.shelf.chunks[0], source=f"{MAIL}.md", title=f"Of {MAIL}", metadata=metadata)
    house.shelf.chunks[0] = chunk
    house.say("Daily [1].")
    options = RetrievalOptions("shop", answer_mode=mode, min_support=0)
    answer = await house.run(ask("help daily", retrieval=options, mask_pii=True))
    (source,) = answer.started.sources
    assert (source.hit.chunk.source, source.hit.chunk.title) == (PIIGuard().mask(f"{MAIL}.md"), "Of [EMAIL]")
    assert source.hit.chunk.metadata == {"who": "[EMAIL]", "all": ("x", "[EMAIL]"), "n": 1.0, "b": True}
    assert [one.document_id for one in answer.citations] == ["a"]
    assert MAIL not in str(answer)
    for request in house.backend.requests:
        assert MAIL not in house.tokenizer.decode(request.prompt_ids)


async def test_a_document_replaced_since_the_search_is_left_out(house, ask) -> None:
    """What stands around its chunk now says nothing of the chunk."""
    house.shelf.add("a", "Help comes daily.")
    house.shelf.add("b", "Help comes at night.")
    house.shelf.documents["a"] = b"Other words."
    options = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, min_support=0)
    answer = await house.run(ask("help comes", retrieval=options, mask_pii=True))
    assert [one.hit.chunk.document_id for one in answer.started.sources] == ["b"]
    assert answer.choices[0].text == "Help comes at night. [1]"


async def test_the_limit_counts_what_is_sent(house, ask) -> None:
    house.shelf.add("a", f"Help: {MAIL}.")
    options = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE, min_support=0)
    tokens = len(house.tokenizer.encode("Help: [EMAIL]. [1]", add_special_tokens=False))
    fields = {"prompt": "help", "retrieval": options, "mask_pii": True}
    answer = await house.run(ask(**fields, stopping=StoppingCriteria(max_output_tokens=tokens)))
    assert answer.choices[0].text == "Help: [EMAIL]. [1]"
    answer = await house.run(ask(**fields, stopping=StoppingCriteria(max_output_tokens=tokens - 1)))
    assert answer.choices[0].finish == Finish(FinishReason.MAX_TOKENS)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=6).map(" ".join),
    tokens_per_step=st.integers(1, 5),
    limit=st.none() | st.integers(1, 4),
)
def test_streams_of_every_chunking(house, roomy, ask, parts, tokens_per_step, limit) -> None:
    """The text is the mask of the whole without invented markers; no message shows more."""
    if not house.shelf.chunks:
        house.shelf.add("a", "kettle")
    house.say(f"x{parts}")
    house.backend.tokens_per_step = tokens_per_step
    request = ask(
        "kettle",
        retrieval=RetrievalOptions("shop", answer_mode=AnswerMode.GENERATIVE, min_support=0),
        output=OutputOptions(max_tokens_per_message=limit),
        sampling=SamplingParams(seed=1),
        mask_pii=True,
    )
    events = asyncio.run(house.events(request))
    answer = collect(events)
    text = answer.choices[0].text
    assert text == PIIGuard().mask(f"x{parts}".replace(" [9]", "").replace("[9]", ""))
    sent = ""
    for event in events:
        if isinstance(event, Deltas):
            sent += event.choices[0].text
            assert text.startswith(sent)
    assert len(answer.citations) == parts.count("[1]")
    for one in answer.citations:
        assert text.encode()[one.text_start : one.text_end] == b"[1]"


async def test_a_marker_that_is_taken_out_joins_nothing_unmasked(house, roomy, ask) -> None:
    house.shelf.add("a", "kettle")
    house.say("Write to jane[9]@example.com, pay with 4111[8] 1111 1111 1111 [1].")
    options = RetrievalOptions("shop", answer_mode=AnswerMode.GENERATIVE, min_support=0)
    answer = await house.run(ask("kettle", retrieval=options, mask_pii=True))
    assert answer.choices[0].text == "Write to [EMAIL], pay with [CARD] [1]."
    assert [(one.text_start, one.text_end) for one in answer.citations] == [(34, 37)]

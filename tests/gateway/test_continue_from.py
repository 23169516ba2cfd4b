"""An answer that a client lost goes on where it was lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.server.errors import FeatureUnsupported, InvalidRequest, ModelRevisionChanged, PromptChanged
from millrace.server.types import (
    AnswerMode,
    Citation,
    Completed,
    ContinueFrom,
    Deltas,
    Finish,
    GenerateEvent,
    GenerateRequest,
    OutputOptions,
    ReceivedChoice,
    RetrievalOptions,
    SamplingParams,
    Started,
    StoppingCriteria,
)

SAYING = "The mill turns slowly; wörds 😀 flow past the wheel 😀😀, and past the old stone bridge."


@dataclass
class Half:
    """What a client has of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


class Client:
    """Puts together what comes, over as many streams as it takes."""

    def __init__(self, n: int = 1):
        self.choices = [Half() for _ in range(n)]
        self.started: Started | None = None
        self.citations: set[Citation] = set()
        self.output_tokens = 0

    def take(self, events: Sequence[GenerateEvent]) -> None:
        for event in events:
            match event:
                case Started():
                    self.started = event
                case Citation():
                    self.citations.add(event)
                case Completed():
                    self.output_tokens += event.usage.output_tokens
                case Deltas():
                    for delta in event.choices:
                        half = self.choices[delta.index]
                        assert delta.token_offset == len(half.token_ids)
                        assert not half.finish, "nothing comes after the finish"
                        half.text += delta.text
                        half.token_ids += delta.token_ids
                        half.logprobs += delta.logprobs.sampled if delta.logprobs else []
                        half.finish = delta.finish

    def rest(self, request: GenerateRequest) -> GenerateRequest:
        """What asks for the rest."""
        assert self.started is not None
        received = {
            index: ReceivedChoice(tuple(half.token_ids), len(half.text.encode()), half.finish is not None)
            for index, half in enumerate(self.choices)
            if half != Half()
        }
        return replace(
            request,
            sampling=replace(request.sampling, seed=self.started.sampling.seed),
            continue_from=ContinueFrom(self.started.model_revision, self.started.prompt_digest, received),
        )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n=st.integers(1, 3), per_message=st.sampled_from([None, 1, 3]), logprobs=st.booleans())
async def test_wherever_it_is_cut(house, ask, data, n, per_message, logprobs) -> None:
    stops = data.draw(st.lists(st.sampled_from(["wheel", "e w", "slow", "😀😀", "s"]), max_size=2, unique=True))
    tokens = house.say(SAYING[data.draw(st.integers(0, 20)) :])
    house.backend.answer = lambda request, choice: [*tokens[3 * choice :], house.eos]
    house.backend.tokens_per_step = data.draw(st.integers(1, 4))
    request = ask(
        sampling=SamplingParams(n=n),
        stopping=StoppingCriteria(
            stop_strings=tuple(stops),
            include_stop=data.draw(st.booleans()),
            max_output_tokens=data.draw(st.sampled_from([None, 1, 9, len(tokens)])),
        ),
        output=OutputOptions(
            token_ids=True, logprobs_top_n=0 if logprobs else None, max_tokens_per_message=per_message
        ),
    )
    undisturbed = Client(n)
    undisturbed.take(await house.events(request))
    client, asked = Client(n), request
    for _ in range(data.draw(st.integers(1, 3))):
        events = await house.events(asked)
        assert isinstance(events[-1], Completed)
        cut = data.draw(st.integers(1, len(events) - 1))
        client.take(events[:cut])
        asked = client.rest(request)
        house.backend.tokens_per_step = data.draw(st.integers(1, 4))
    before = sum(len(half.token_ids) for half in client.choices)
    client.take(await house.events(asked))
    assert client.output_tokens == undisturbed.output_tokens - before
    assert client.choices == undisturbed.choices


async def test_only_what_goes_on_is_computed(house, ask) -> None:
    tokens = house.say(SAYING)
    request = ask(sampling=SamplingParams(n=2, seed=7), output=OutputOptions(token_ids=True))
    client = Client(2)
    client.take(await house.events(request))
    text = house.tokenizer.decode(tokens[:5])
    client.choices[1] = Half(text, tokens[:5])
    await house.events(client.rest(request))
    (_, last) = house.backend.requests
    assert last.outputs == {1: tuple(tokens[:5])}
    client.choices[1] = Half()
    await house.events(client.rest(request))
    assert house.backend.requests[-1].outputs == {1: ()}


async def test_an_answer_whose_finish_alone_was_lost_needs_no_backend(house, ask) -> None:
    tokens = house.say(SAYING)
    request = ask(
        stopping=StoppingCriteria(max_output_tokens=9),
        output=OutputOptions(token_ids=True),
        sampling=SamplingParams(seed=1),
    )
    client = Client()
    client.take(await house.events(request))
    whole = client.choices[0]
    client.choices[0] = Half(whole.text, tokens[:9])
    client.take(await house.events(client.rest(request)))
    assert client.choices == [whole]
    assert len(house.backend.requests) == 1


async def test_answers_from_documents_go_on_while_the_documents_are_the_same(house, ask, roomy) -> None:
    house.shelf.add("bikes", "The bridge was built of old stone. Bikes are allowed on the bridge.")
    house.say("It is of stone [1]. Bikes may cross it [1]. That is all there is to say.")
    request = ask(
        prompt="What is the bridge built of?",
        retrieval=RetrievalOptions("shop", answer_mode=AnswerMode.GENERATIVE),
        output=OutputOptions(token_ids=True),
    )
    undisturbed = Client()
    events = await house.events(request)
    undisturbed.take(events)
    assert len(undisturbed.citations) == 2
    for cut in range(1, len(events)):
        client = Client()
        client.take(events[:cut])
        client.take(await house.events(client.rest(request)))
        assert client.choices == undisturbed.choices
        assert client.citations == undisturbed.citations
    client = Client()
    client.take(events[:4])
    house.shelf.add("more", "The bridge is said to be built in 1790.")
    with pytest.raises(PromptChanged):
        await house.events(client.rest(request))


async def test_what_cannot_go_on(house, ask, roomy) -> None:
    tokens = house.say(SAYING)
    request = ask(sampling=SamplingParams(temperature=1, seed=3), output=OutputOptions(token_ids=True))
    client = Client()
    client.take((await house.events(request))[:6])
    rest = client.rest(request)
    asked = len(house.backend.requests)

    async def refused(error: type[Exception], request: GenerateRequest, match: str) -> None:
        with pytest.raises(error, match=match):
            await house.events(request)
        assert len(house.backend.requests) == asked, "refused at the door"

    def having(*token_ids: int, **fields: int) -> GenerateRequest:
        choices = {0: ReceivedChoice(token_ids, **fields)}
        return replace(rest, continue_from=replace(rest.continue_from, choices=choices))

    await refused(PromptChanged, replace(rest, prompt="Hello where"), "send the request that began it")
    await refused(
        ModelRevisionChanged,
        replace(rest, continue_from=replace(rest.continue_from, model_revision="x")),
        "begun by another",
    )
    await refused(InvalidRequest, replace(rest, sampling=SamplingParams(temperature=1)), "seed")
    await refused(InvalidRequest, having(8192), "vocabulary")
    await refused(InvalidRequest, having(*[5] * 5000), "more than the")
    await refused(InvalidRequest, replace(having(house.eos)), "ends before")
    await refused(FeatureUnsupported, replace(rest, output=OutputOptions(), mask_pii=True), "masked")
    house.shelf.add("bikes", "The bridge was built of old stone.")
    quoting = RetrievalOptions("shop", answer_mode=AnswerMode.EXTRACTIVE)
    question = replace(rest, prompt="What is the bridge built of?", output=OutputOptions(), retrieval=quoting)
    await refused(FeatureUnsupported, question, "ask again")
    no_answer = RetrievalOptions("shop", answer_mode=AnswerMode.GENERATIVE)
    await refused(PromptChanged, replace(rest, prompt="Who is prime minister?", retrieval=no_answer), "not found again")
    within = SAYING.encode().index("ö".encode()) + 1
    with pytest.raises(InvalidRequest, match="within a character"):
        await house.events(having(*tokens[:3], text_bytes=within))
    with pytest.raises(InvalidRequest, match="ends before"):
        await house.events(having(*tokens[:3], text_bytes=10_000))
    house.check_idle()

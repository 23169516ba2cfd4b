"""The gateway: from a request to a stream of events, and the smaller questions around it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager

from millrace.server.backends.base import TokenStream
from millrace.server.errors import Drained, Draining, EngineLost, EngineRestarting
from millrace.server.gateway.choices import Choices
from millrace.server.gateway.effective import token_request
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.prompt import check_vocabulary, encode_prompt, run_beside, size_of, template_of
from millrace.server.gateway.record import RequestRecord
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.tokenizer import Tokenized
from millrace.server.types import (
    Caller,
    ChatPrompt,
    Completed,
    Finish,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    Started,
    TokenRequest,
)

ENCODERS = 2  # threads that tokenize long prompts


class Gateway:
    """One instance belongs to one event loop."""

    def __init__(self, routes: Routes, limits: Limits, metrics: Metrics):
        self.routes, self.limits, self.metrics = routes, limits, metrics
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")

    async def generate(self, caller: Caller, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Yield Started once the backend has admitted the request, then Deltas, then one Completed.

        Raises a RequestError before the first event if the request is rejected, later if it breaks. Close the
        generator (`contextlib.aclosing`) to cancel: everything the request holds is free when that returns.
        Output tokens are billed if they were sent: not a stop token, nor the tokens of a stop string, unless
        `include_stop` keeps them.
        """
        record = RequestRecord(self.metrics, caller, request)
        with record.watch(), self.limits.admit(caller.tenant, request.request_id) as live:
            record.request_id = live.request_id
            card = self.routes.resolve(request.model)
            info = card.backend.info()
            prompt_ids = await encode_prompt(card, request, info, self._encoders)
            tokens, ran_out = token_request(card, request, info, live.request_id, caller.tenant, prompt_ids)
            live.check()
            async with aclosing(await card.backend.generate(tokens)) as stream:
                choices = Choices(card.tokenizer, request, len(prompt_ids), ran_out, stream.stop)
                record.admitted(choices)
                stop_all = stopper(stream, tokens)
                live.on_abort(stop_all)
                with time_limit(request.stopping.time_limit, stop_all) as clock, past_first_message():
                    yield Started(
                        request_id=live.request_id,
                        model=card.name,
                        model_revision=info.fingerprint,
                        sampling=tokens.sampling,
                        n=tokens.n,
                        prompt_ids=prompt_ids if request.output.prompt_token_ids else None,
                        usage=choices.usage,
                        max_output_tokens=tokens.max_output_tokens,
                    )
                    async for news in stream:
                        record.step(news)
                        for deltas in choices.push(news):
                            yield deltas
                    live.check()
                if clock.passed:
                    for deltas in choices.end(Finish(FinishReason.TIME_LIMIT)):
                        yield deltas
                choices.check()
            yield Completed(choices.usage, record.timings())

    def models(self) -> Sequence[ModelCard]:
        return self.routes.cards

    def model(self, name: str) -> ModelCard:
        """Raises ModelNotFound."""
        return self.routes.resolve(name)

    async def tokenize(self, model: str, texts: Sequence[str], add_special_tokens: bool = True) -> list[Tokenized]:
        """Token ids of each text, and where in its bytes they lie."""
        tokenizer = self.routes.resolve(model).tokenizer
        return await run_beside(
            self._encoders,
            sum(map(len, texts)),
            lambda: [tokenizer.encode_with_offsets(text, add_special_tokens) for text in texts],
        )

    async def detokenize(
        self, model: str, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """Text of each sequence. Raises InvalidRequest at an id that the tokenizer does not have."""
        tokenizer = self.routes.resolve(model).tokenizer
        for index, ids in enumerate(sequences):
            check_vocabulary(f"sequences[{index}].ids", ids, tokenizer.vocab_size)
        return await run_beside(
            self._encoders,
            sum(map(len, sequences)),
            lambda: [tokenizer.decode(ids, skip_special_tokens) for ids in sequences],
        )

    async def render_chat(self, model: str, chat: ChatPrompt) -> tuple[str, list[int]]:
        """The prompt that a conversation becomes, as text and as token ids."""
        template = template_of(self.routes.resolve(model))
        return await run_beside(self._encoders, size_of(chat), lambda: (template.render(chat), template.encode(chat)))

    async def drain(self, grace: float) -> None:
        """Refuse new requests, let live ones run for `grace` seconds, end the rest.

        They end with Draining before Started, with Drained after it.
        """
        self.limits.refuse()
        if not await self.limits.idle(grace):
            self.limits.abort(Draining("the server is shutting down and the request had not ended in time"))

    def close(self) -> None:
        self._encoders.shutdown(wait=False, cancel_futures=True)


def stopper(stream: TokenStream, tokens: TokenRequest) -> Callable[[], None]:
    """What ends every choice of a stream; its iteration then ends."""

    def stop_all() -> None:
        for choice in range(tokens.n):
            stream.stop(choice)

    return stop_all


@contextmanager
def past_first_message() -> Iterator[None]:
    """What could be tried again elsewhere had the client not seen Started: a backend that dies, a drain."""
    try:
        yield
    except Draining as error:
        raise Drained(error.message, metadata=error.metadata) from None
    except EngineRestarting as error:
        raise EngineLost(error.message, metadata=error.metadata) from None


class Clock:
    passed = False


@contextmanager
def time_limit(seconds: float | None, expire: Callable[[], None]) -> Iterator[Clock]:
    """Call `expire` if the block takes longer; None is no limit."""
    clock = Clock()
    if seconds is None:
        yield clock
        return

    def on_time() -> None:
        clock.passed = True
        expire()

    timer = asyncio.get_running_loop().call_later(seconds, on_time)
    try:
        yield clock
    finally:
        timer.cancel()

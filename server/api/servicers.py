"""The services of `millrace.v1`: translate, call the gateway, translate back."""

from contextlib import aclosing

from millrace.server.api import requests, responses
from millrace.server.api.endpoint import Stream
from millrace.server.api.paging import page_name, page_token
from millrace.server.errors import Aborted, Drained, Draining, EngineLost, EngineRestarting
from millrace.server.gateway.collect import collect
from millrace.server.gateway.gateway import Gateway
from millrace.server.types import Caller, Started
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2, tokenizer_pb2

DEFAULT_PAGE_SIZE = 100


class GenerationServicer:
    def __init__(self, gateway: Gateway):
        self._gateway = gateway

    async def generate(self, message: pb.GenerateRequest, caller: Caller) -> pb.GenerateResponse:
        request = requests.generate_request(message)
        try:
            async with aclosing(self._gateway.generate(caller, request)) as events:
                answer = collect([event async for event in events])
        except EngineLost as error:  # the client has seen nothing of it yet
            raise EngineRestarting("the engine is restarting; retry the request") from error
        except Drained as error:  # nor of this
            raise Draining(error.message) from error
        return responses.generate_response(answer, with_token_ids=request.output.token_ids)

    async def stream_generate(self, message: pb.GenerateRequest, caller: Caller, stream: Stream) -> None:
        """Number the events. Pacing: while a write waits, what the backend makes merges behind it."""
        request = requests.generate_request(message)
        sequence, resume = 0, {}
        try:
            async with aclosing(self._gateway.generate(caller, request)) as events:
                async for event in events:
                    if isinstance(event, Started):
                        resume = {"request_id": event.request_id, "seed": str(event.sampling.seed)}
                    await stream.write(responses.stream_response(sequence + 1, event))
                    sequence += 1
        except Aborted as error:
            # A copy: others may read the same answer.
            where = {**error.metadata, **resume, "last_sequence": str(sequence)}
            raise type(error)(error.message, metadata=where, retry_after=error.retry_after) from error


class TokenizerServicer:
    def __init__(self, gateway: Gateway):
        self._gateway = gateway

    async def tokenize(self, message: tokenizer_pb2.TokenizeRequest, _: Caller) -> tokenizer_pb2.TokenizeResponse:
        add_special_tokens = message.add_special_tokens if message.HasField("add_special_tokens") else True
        results = await self._gateway.tokenize(message.model, message.texts, add_special_tokens)
        return tokenizer_pb2.TokenizeResponse(
            results=[
                tokenizer_pb2.TokenizedText(
                    token_ids=pb.TokenIds(ids=one.ids), byte_offsets=one.byte_offsets if message.offsets else ()
                )
                for one in results
            ]
        )

    async def detokenize(self, message: tokenizer_pb2.DetokenizeRequest, _: Caller) -> tokenizer_pb2.DetokenizeResponse:
        skip_special_tokens = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        sequences = [requests.token_ids(one, f"sequences[{i}]") for i, one in enumerate(message.sequences)]
        texts = await self._gateway.detokenize(message.model, sequences, skip_special_tokens)
        return tokenizer_pb2.DetokenizeResponse(texts=texts)

    async def render_chat(
        self, message: tokenizer_pb2.RenderChatRequest, _: Caller
    ) -> tokenizer_pb2.RenderChatResponse:
        text, ids = await self._gateway.render_chat(message.model, requests.chat_prompt(message.chat))
        return tokenizer_pb2.RenderChatResponse(text=text, token_ids=pb.TokenIds(ids=ids))


class ModelServicer:
    def __init__(self, gateway: Gateway, max_request_bytes: int):
        self._gateway, self._max_request_bytes = gateway, max_request_bytes

    async def list_models(self, message: model_pb2.ListModelsRequest, _: Caller) -> model_pb2.ListModelsResponse:
        """Models by name; the page token is the last name of the page before, so pages survive changes."""
        after = page_name(message.page_token)
        cards = sorted((card for card in self._gateway.models() if card.name > after), key=lambda card: card.name)
        size = message.page_size or DEFAULT_PAGE_SIZE
        page = cards[:size]
        return model_pb2.ListModelsResponse(
            models=[responses.model(card, self._max_request_bytes) for card in page],
            next_page_token=page_token(page[-1].name) if len(cards) > size else "",
        )

    async def get_model(self, message: model_pb2.GetModelRequest, _: Caller) -> model_pb2.Model:
        return responses.model(self._gateway.model(message.name), self._max_request_bytes)

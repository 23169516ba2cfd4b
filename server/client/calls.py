"""What both clients share: the messages they send, the parts of an answer they return."""

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from millrace.server.client.connection import TLS, Connection
from millrace.server.client.failures import request_error
from millrace.server.client.fields import field
from millrace.server.client.requests import chat_prompt
from millrace.server.errors import ConfigError, ModelNotFound, RequestError
from millrace.server.types import Message
from millrace.v1 import (
    embedding_pb2_grpc,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    retrieval_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from millrace.v1 import generation_pb2 as pb


class Calls:
    """`model`: used where a call names none; None means the first one that the server lists.
    `timeout`: the deadline of each call in seconds; None means none."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        tls: TLS | None = None,
        timeout: float | None = None,
    ):
        """Raises ConfigError for an address, key or TLS file that no connection can be made with."""
        self.connection = Connection(address, api_key, tls)
        check(self.connection)
        self.model = model
        self.timeout = timeout

    def _make_stubs(self, channel: Any) -> None:  # grpc.Channel or grpc.aio.Channel: the stubs take either
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._retrieval = retrieval_pb2_grpc.RetrievalServiceStub(channel)
        self._embedding = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        self._tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self._models = model_pb2_grpc.ModelServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    @property
    def _call_options(self) -> dict[str, Any]:
        return {"timeout": self.timeout, "metadata": self.connection.metadata}

    def _error(self, failure: grpc.RpcError) -> RequestError:
        return request_error(failure, self.connection.target)


def check(connection: Connection) -> None:
    """gRPC says of these what nobody understands, or says it in its own log."""
    if not (connection.target and connection.target.isprintable()):
        raise ConfigError(
            f"the address {connection.address!r} is none: write HOST:PORT, grpcs://HOST:PORT or unix:PATH"
        )
    key = connection.api_key or ""
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the API key holds a line end or other characters that no key has: copy it again")


def first_model(models: Sequence[model_pb2.Model]) -> str:
    if not models:
        raise ModelNotFound("the server has no model", resource_type="model", resource_name="")
    return models[0].name


def tokenize_request(model: str, text: str, add_special_tokens: bool) -> tokenizer_pb2.TokenizeRequest:
    with field("text"):
        return tokenizer_pb2.TokenizeRequest(model=model, texts=[text], add_special_tokens=add_special_tokens)


def detokenize_request(model: str, token_ids: Sequence[int]) -> tokenizer_pb2.DetokenizeRequest:
    with field("token_ids"):
        return tokenizer_pb2.DetokenizeRequest(model=model, sequences=[pb.TokenIds(ids=token_ids)])


def render_request(model: str, messages: Sequence[Message]) -> tokenizer_pb2.RenderChatRequest:
    with field("messages"):
        return tokenizer_pb2.RenderChatRequest(model=model, chat=chat_prompt(messages))


def health_request(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def health_name(response: health_pb2.HealthCheckResponse) -> str:
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def state_name(model: model_pb2.Model) -> str:
    """`ready`, `loading` or `failed`."""
    return model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()


def new_text(event: pb.StreamGenerateResponse) -> str:
    """What the first choice gained."""
    return "".join(choice.text for choice in event.deltas.choices if choice.index == 0)

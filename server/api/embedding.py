"""`EmbeddingService`: texts in, vectors out."""

from collections.abc import Sequence

import numpy as np

from millrace.server.api.requests import token_ids
from millrace.server.errors import InvalidRequest
from millrace.server.gateway.gateway import Gateway
from millrace.server.types import Caller
from millrace.v1 import embedding_pb2 as pb
from millrace.v1 import generation_pb2


class EmbeddingServicer:
    def __init__(self, gateway: Gateway):
        self._gateway = gateway

    async def embed(self, message: pb.EmbedRequest, caller: Caller) -> pb.EmbedResponse:
        inputs = [one_input(one, f"inputs[{index}]") for index, one in enumerate(message.inputs)]
        truncate_tokens = message.truncate_tokens if message.HasField("truncate_tokens") else None
        answer = await self._gateway.embed(caller, message.model, inputs, truncate_tokens)
        half = message.type == pb.EMBEDDING_TYPE_FLOAT16
        return pb.EmbedResponse(
            model=answer.model,
            model_revision=answer.revision,
            type=pb.EMBEDDING_TYPE_FLOAT16 if half else pb.EMBEDDING_TYPE_FLOAT32,
            dimensions=answer.dimensions,
            vectors=float16(answer.vectors) if half else b"".join(answer.vectors),
            usage=generation_pb2.Usage(embedding_tokens=answer.tokens),
        )


def one_input(message: pb.EmbedInput, path: str) -> str | list[int]:
    """Raises InvalidRequest for token ids that are none."""
    if message.WhichOneof("input") == "text":
        return message.text
    ids = token_ids(message.token_ids, f"{path}.token_ids")
    if not ids:
        raise InvalidRequest.at(f"{path}.token_ids", "an input needs at least one token id")
    return ids


def float16(vectors: Sequence[bytes]) -> bytes:
    """Little-endian float32 rounded to the nearest float16."""
    return np.frombuffer(b"".join(vectors), "<f4").astype("<f2").tobytes()

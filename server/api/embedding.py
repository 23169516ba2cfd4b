"""`EmbeddingService`: texts in, vectors out."""

from millrace.server.api.requests import token_ids
from millrace.server.gateway.gateway import Gateway
from millrace.server.types import Caller
from millrace.v1 import embedding_pb2 as pb
from millrace.v1 import generation_pb2

LAYOUTS = {pb.EMBEDDING_TYPE_FLOAT32: "<f4", pb.EMBEDDING_TYPE_FLOAT16: "<f2"}  # as numpy names them


class EmbeddingServicer:
    def __init__(self, gateway: Gateway):
        self._gateway = gateway

    async def embed(self, message: pb.EmbedRequest, caller: Caller) -> pb.EmbedResponse:
        inputs = [one_input(one, f"inputs[{index}]") for index, one in enumerate(message.inputs)]
        truncate_tokens = message.truncate_tokens if message.HasField("truncate_tokens") else None
        info, embedded = await self._gateway.embed(caller, inputs, message.model, truncate_tokens)
        kind = message.type or pb.EMBEDDING_TYPE_FLOAT32
        return pb.EmbedResponse(
            model=info.name,
            model_revision=info.revision,
            type=kind,
            dimensions=info.dimensions,
            vectors=embedded.vectors.astype(LAYOUTS[kind]).tobytes(),
            usage=generation_pb2.Usage(embedding_tokens=embedded.tokens),
        )


def one_input(message: pb.EmbedInput, path: str) -> str | list[int]:
    """Raises InvalidRequest for token ids in a form that is none."""
    return message.text if message.WhichOneof("input") == "text" else token_ids(message.token_ids, f"{path}.token_ids")

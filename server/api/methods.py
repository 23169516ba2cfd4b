"""Every RPC of the public port with its policy. One that is not in the table stops the start-up."""

import re
from collections.abc import AsyncIterator, Iterator, Mapping

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection

from millrace.server.api.endpoint import Method, Policy, Stream
from millrace.server.errors import StartupError
from millrace.server.types import Caller
from millrace.v1 import embedding_pb2, generation_pb2, model_pb2, retrieval_pb2, tokenizer_pb2

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
TOKENIZER = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"]
RETRIEVAL = retrieval_pb2.DESCRIPTOR.services_by_name["RetrievalService"]
EMBEDDING = embedding_pb2.DESCRIPTOR.services_by_name["EmbeddingService"]
MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
SERVICES = (GENERATION, RETRIEVAL, EMBEDDING, TOKENIZER, MODEL, HEALTH, REFLECTION)

POLICIES = {
    "/millrace.v1.GenerationService/Generate": Policy.TENANT,
    "/millrace.v1.GenerationService/StreamGenerate": Policy.TENANT,
    "/millrace.v1.RetrievalService/UpsertDocuments": Policy.TENANT,
    "/millrace.v1.RetrievalService/DeleteDocuments": Policy.TENANT,
    "/millrace.v1.RetrievalService/GetDocument": Policy.TENANT,
    "/millrace.v1.RetrievalService/ListCollections": Policy.TENANT,
    "/millrace.v1.RetrievalService/DeleteCollection": Policy.TENANT,
    "/millrace.v1.RetrievalService/Query": Policy.TENANT,
    "/millrace.v1.EmbeddingService/Embed": Policy.TENANT,
    "/millrace.v1.TokenizerService/Tokenize": Policy.TENANT,
    "/millrace.v1.TokenizerService/Detokenize": Policy.TENANT,
    "/millrace.v1.TokenizerService/RenderChat": Policy.TENANT,
    "/millrace.v1.ModelService/ListModels": Policy.TENANT,
    "/millrace.v1.ModelService/GetModel": Policy.TENANT,
    "/grpc.health.v1.Health/Check": Policy.PUBLIC,
    "/grpc.health.v1.Health/List": Policy.PUBLIC,
    "/grpc.health.v1.Health/Watch": Policy.PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Policy.PUBLIC,
}


def methods(
    service: ServiceDescriptor, servicer: object, policies: Mapping[str, Policy] = POLICIES
) -> Iterator[Method]:
    """The methods of a service; `servicer` has each under its name in snake case. StartupError without a policy."""
    for method in service.methods:
        path = f"/{service.full_name}/{method.name}"
        if path not in policies:
            raise StartupError(f"RPC {path} has no policy; declare it in millrace/server/api/methods.py")
        yield Method(
            service=service.full_name,
            name=method.name,
            policy=policies[path],
            request=GetMessageClass(method.input_type),
            run=getattr(servicer, re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()),
            client_streams=method.client_streaming,
            server_streams=method.server_streaming,
        )


class ReflectionServicer:
    """The public services and their messages, for tools such as grpcurl."""

    def __init__(self) -> None:
        self._answers = reflection.ReflectionServicer([service.full_name for service in SERVICES])

    async def server_reflection_info(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], _: Caller, stream: Stream
    ) -> None:
        async for response in self._answers.ServerReflectionInfo(requests, None):
            await stream.write(response)

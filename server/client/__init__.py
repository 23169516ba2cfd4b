"""The Python client, sync and async, over the generated stubs.

    with Client("127.0.0.1:50051") as client:
        for text in client.stream_text("A mill race is", max_output_tokens=40):
            print(text, end="", flush=True)

Requests are built from keyword arguments, answers are the messages of `millrace.v1`, whose fields are
documented in `proto/`. Failures are the errors of `millrace.server.errors`, as the server raised them.
"""

from millrace.retrieval.types import Document, MediaType
from millrace.server.client.aio import AsyncClient
from millrace.server.client.calls import new_text, state_name
from millrace.server.client.connection import DEFAULT_ADDRESS, TLS
from millrace.server.client.documents import QueryOptions
from millrace.server.client.received import Received
from millrace.server.client.requests import Options, Prompt
from millrace.server.client.sync import Client
from millrace.server.types import Message, Role

__all__ = [
    "DEFAULT_ADDRESS",
    "TLS",
    "AsyncClient",
    "Client",
    "Document",
    "MediaType",
    "Message",
    "Options",
    "Prompt",
    "QueryOptions",
    "Received",
    "Role",
    "new_text",
    "state_name",
]

"""Commands on documents. Where no server listens they start one for themselves."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from millrace.server.commands.options import (
    CA,
    LOCAL,
    ApiKey,
    MaxTokens,
    Model,
    Seed,
    Temperature,
    given,
    print_table,
    quiet_grpc,
)

Collection = Annotated[str, typer.Option("--collection", "-c", help="name of the collection")]
# Unlike elsewhere None: where no server listens by default, a command on documents starts one for itself.
Where = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="MILLRACE_ADDRESS",
        help=f"HOST:PORT, grpcs://HOST:PORT or unix:PATH (default: {LOCAL}, or if nothing listens there a server "
        "that runs as long as this command)",
    ),
]


class AnswerModeName(Enum):
    EXTRACTIVE = "extractive"
    GENERATIVE = "generative"


def ingest(
    paths: Annotated[list[Path], typer.Argument(help="files and folders: text, Markdown, HTML and PDF")],
    collection: Collection,
    address: Where = None,
    api_key: ApiKey = None,
    ca: CA = None,
) -> None:
    """Put documents into a collection, which comes into being with its first one.

    The same files again cost little: what has not changed is not embedded again.
    """
    quiet_grpc()
    from rich.console import Console

    from millrace.server.client import TLS, Client
    from millrace.server.ingest import ingest as send

    with reach(address) as target, Client(target, api_key=api_key, tls=TLS(ca) if ca else None) as client:
        status = send(client, collection, paths, Console())
    raise typer.Exit(status)


def ask(
    question: Annotated[str, typer.Argument(help="what you want to know; - reads it from stdin")],
    collection: Collection,
    address: Where = None,
    api_key: ApiKey = None,
    ca: CA = None,
    model: Model = None,
    mode: Annotated[
        AnswerModeName | None,
        typer.Option("--mode", help="extractive quotes the documents, generative lets the model write from them"),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, max=50, help="chunks to answer from")] = None,
    max_sentences: Annotated[
        int | None, typer.Option("--max-sentences", min=1, max=20, help="of an extractive answer")
    ] = None,
    min_support: Annotated[
        float | None, typer.Option("--min-support", min=0, max=1, help="support that an answer needs")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
) -> None:
    """Answer a question from a collection, with citations."""
    quiet_grpc()
    from millrace.server.ask import ask as answer
    from millrace.server.client import TLS, Client

    text = sys.stdin.read() if question == "-" else question
    retrieval = given(
        collection=collection,
        answer_mode=mode.value if mode else None,
        top_k=top_k,
        max_sentences=max_sentences,
        min_support=min_support,
    )
    options = given(retrieval=retrieval, max_output_tokens=max_tokens, temperature=temperature, seed=seed)
    with (
        reach(address) as target,
        Client(target, api_key=api_key, model=model, tls=TLS(ca) if ca else None) as client,
    ):
        answer(client, text, options)


def collections(address: Where = None, api_key: ApiKey = None, ca: CA = None) -> None:
    """List your collections.

    Name, documents, chunks, embedding model and kind of index: a table on a terminal, else separated by tabs.
    """
    quiet_grpc()
    from millrace.server.client import TLS, Client

    with reach(address) as target, Client(target, api_key=api_key, tls=TLS(ca) if ca else None) as client:
        found = client.collections()
    rows = [(c.name, str(c.documents), str(c.chunks), c.embedding_model, c.index) for c in found]
    print_table(("name", "documents", "chunks", "embedding model", "index"), rows)


@contextmanager
def reach(address: str | None) -> Iterator[str]:
    """The address given, or the usual one, or that of a server that runs as long as the block."""
    from millrace.server.local import LocalServerFailed, listens, local_server

    if address is not None or listens(LOCAL):
        yield LOCAL if address is None else address
        return
    print(f"No server at {LOCAL}: starting one for this command (`millrace serve` keeps one running).", file=sys.stderr)
    try:
        with local_server() as own:
            yield own
    except LocalServerFailed as error:
        if error.told:
            raise typer.Exit(1) from None
        raise

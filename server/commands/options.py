"""Options that several commands have, and what they do alike."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Address = Annotated[
    str, typer.Option("--address", envvar="MILLRACE_ADDRESS", help="HOST:PORT, grpcs://HOST:PORT or unix:PATH")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="MILLRACE_API_KEY", help="key of your tenant")]
CA = Annotated[Path | None, typer.Option("--ca", help="trust this CA (PEM): connect with TLS")]
Model = Annotated[str | None, typer.Option("--model", help="name of the model (default: the server's first)")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, max=2**20, help="tokens of the answer, at most")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 always takes the likeliest token")]
TopP = Annotated[float | None, typer.Option("--top-p", help="keep the likeliest tokens of this total probability")]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, max=2**20, help="keep this many likeliest tokens")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**64 - 1, help="the same seed draws the same answer")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="end before this text; may be repeated")]
LOCAL = "127.0.0.1:50051"


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    if not sys.stdout.isatty():
        for row in rows:
            print(*row, sep="\t")
        return
    table = Table(*(Column(name, overflow="fold") for name in names), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def quiet_grpc() -> None:
    """gRPC reads both when it is imported. Workers are spawned, so its fork handlers only complain; what its core
    writes to stderr (goaways, taken ports) we report ourselves."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def given(**options: Any) -> Any:
    """The options that were given; the others are the model's own."""
    return {name: value for name, value in options.items() if value is not None}

"""The command line. Commands import what they need when they run: `millrace --version` must not wait for gRPC."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from millrace.server.commands import bench, documents
from millrace.server.commands.options import (
    CA,
    LOCAL,
    Address,
    ApiKey,
    MaxTokens,
    Model,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    given,
    print_table,
    quiet_grpc,
)
from millrace.server.config import COMPONENTS, DAY, load_settings
from millrace.server.errors import MillraceError
from millrace.server.flags import with_settings

app = typer.Typer(
    name="millrace",
    help="One gRPC server that takes a question and streams back an answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(help="API keys, each of one tenant.", no_args_is_help=True)
app.add_typer(keys, name="keys")

Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings, names as the flags below")]


@app.command()
@with_settings(*COMPONENTS)
def serve(
    config: Config = None,
    parent_pid: Annotated[int | None, typer.Option("--parent-pid", hidden=True, help="end with this process")] = None,
    **flags: Any,
) -> None:
    """Serve a model over gRPC until SIGTERM.

    Every setting can also stand in --config FILE or in the environment as MILLRACE_NAME; flags win over the
    environment, and the environment over the file.
    """
    quiet_grpc()
    from millrace.server.start import run
    from millrace.server.worker.parent import die_with

    if parent_pid is not None:
        die_with(parent_pid)
    raise typer.Exit(run(load_settings(flags, config)))


@app.command()
@with_settings(*COMPONENTS)
def doctor(config: Config = None, **flags: Any) -> None:
    """Check whether `millrace serve` would work here, with the same settings, and print what they come to."""
    quiet_grpc()
    from rich.console import Console

    from millrace.server.doctor import examine

    raise typer.Exit(examine(load_settings(flags, config), Console()))


@app.command()
@with_settings("engine")
def worker(
    listen: Annotated[str, typer.Option("--listen", help="unix:PATH, or HOST:PORT with mutual TLS")],
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="certificate chain of this worker (PEM)")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="its key (PEM)")] = None,
    tls_ca: Annotated[Path | None, typer.Option("--tls-ca", help="CA of the gateways that may connect (PEM)")] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, max=DAY, help="seconds that live requests get after SIGTERM")
    ] = 10,
    config: Config = None,
    **flags: Any,
) -> None:
    """Run an engine that gateways elsewhere connect to, with their --worker.

    What happens goes to standard output, one JSON object a line.
    """
    quiet_grpc()
    from millrace.server.worker.main import main as run_worker

    engine = load_settings(flags, config).engine
    files = {"cert": tls_cert, "key": tls_key, "ca": tls_ca}
    given = [f"--tls-{name}={path}" for name, path in files.items() if path]
    run_worker([f"--listen={listen}", f"--engine-config={engine.model_dump_json()}", f"--grace={grace}", *given])


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue, or the question with --chat; - reads it from stdin")],
    address: Address = LOCAL,
    api_key: ApiKey = None,
    ca: CA = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="ask through the chat template")] = False,
) -> None:
    """Send one prompt and write the answer to standard output as it comes."""
    from millrace.server.client import TLS, Client, Message, Role

    text = sys.stdin.read() if prompt == "-" else prompt
    question = [Message(Role.USER, text)] if chat else text
    options = given(
        max_output_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop_strings=stop
    )
    with Client(address, api_key=api_key, model=model, tls=TLS(ca) if ca else None) as client:
        for piece in client.stream_text(question, **options):
            print(piece, end="", flush=True)
    print()


@app.command()
def chat(
    address: Address = LOCAL,
    api_key: ApiKey = None,
    ca: CA = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", help="what the model is told before you speak")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
) -> None:
    """Talk with a model. Ctrl-C cancels an answer, Ctrl-D leaves."""
    from millrace.server.chat import converse
    from millrace.server.client import TLS, Client

    options = given(max_output_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    with Client(address, api_key=api_key, model=model, tls=TLS(ca) if ca else None) as client:
        converse(client, system, options)


for command in (documents.ingest, documents.ask, documents.collections):
    app.command()(command)
app.command(context_settings=bench.ANY)(bench.bench)


@app.command()
def models(address: Address = LOCAL, api_key: ApiKey = None, ca: CA = None) -> None:
    """List what a server can be asked for.

    Name, state, tokens of context, architecture and backend: a table on a terminal, else separated by tabs.
    """
    from millrace.server.client import TLS, Client, state_name

    with Client(address, api_key=api_key, tls=TLS(ca) if ca else None) as client:
        found = client.models()
    rows = [(m.name, state_name(m), str(m.limits.max_context_tokens), m.architecture, m.backend) for m in found]
    print_table(("name", "state", "context", "architecture", "backend"), rows)


@keys.command()
def new(tenant: Annotated[str, typer.Option("--tenant", help="whose key it is: 1 to 64 of [A-Za-z0-9._-]")]) -> None:
    """Make a key: the key itself goes to standard error, once; what to append to --api-keys FILE to standard output.

    millrace keys new --tenant search >> keys.toml
    """
    from millrace.server.gateway.auth import new_key

    key, entry = new_key(tenant)
    print(f"The key, shown only now: {key}", file=sys.stderr)
    print(entry)


def _version(asked: bool) -> None:
    if asked:
        try:
            print(f"millrace {version('millrace')}")
        except PackageNotFoundError:
            print("millrace, run from a source tree")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> int:
    """Exit status: 0, 1 with one line that says what to do, 2 for wrong usage, 130 for Ctrl-C."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; the client says which field is no text
    try:
        app()
    except MillraceError as error:
        print(f"millrace: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone; nor flush at exit
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

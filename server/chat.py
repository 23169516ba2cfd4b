"""The conversation of `millrace chat`."""

from contextlib import closing

from rich.console import Console

from millrace.server.client import Client, Message, Options, Role
from millrace.server.errors import RequestError


def converse(client: Client, system: str | None, options: Options) -> None:
    """Read lines until end of file; each is answered with all before it in view.

    An answer that was cancelled stays in the conversation as far as it came; a question that failed does not.
    """
    console = Console(highlight=False)
    history = [Message(Role.SYSTEM, system)] if system else []
    names = ", ".join(model.name for model in client.models())
    console.print(f"{names} at {client.connection.target}. Ctrl-C cancels an answer, Ctrl-D leaves.", style="dim")
    while (question := ask(console)) is not None:
        if not question.strip():
            continue
        history.append(Message(Role.USER, question))
        try:
            history.append(Message(Role.ASSISTANT, answer(client, history, options)))
        except RequestError as error:
            history.pop()
            console.print(f"millrace: {error}", style="red", markup=False)


def ask(console: Console) -> str | None:
    """None at the end of input."""
    try:
        return console.input("[bold cyan]> [/]")
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        return ""


def answer(client: Client, history: list[Message], options: Options) -> str:
    """Print an answer as it comes; Ctrl-C ends it early."""
    pieces: list[str] = []
    try:
        with closing(client.stream_text(history, **options)) as stream:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (cancelled)", end="")
    print()
    return "".join(pieces)

"""`make demo`: start a server on the built-in model, ask it, load it, stop it. Exit status 0 only if all went well."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.table import Table

from millrace.server.client import Client, new_text
from millrace.server.errors import MillraceError

QUESTION = "What does a load balancer do? A load balancer"
SUBJECTS = ("A cache", "A queue", "A thread", "A token", "An index", "A server", "A client", "A lock") * 2
TOKENS = 64
READY = re.compile(r"grpc://(\S+)")
STOP_TIMEOUT = 60.0


class DemoFailed(MillraceError):
    pass


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from sending to the first text and to the end."""

    tokens: int
    first: float
    total: float


def main() -> int:
    console = Console(highlight=False)
    try:
        with server(console) as address, Client(address) as client:
            console.print(f"\n[bold]One question[/]\n[cyan]{QUESTION}[/]", end="")
            single = ask(client, QUESTION, seed=0, echo=console)
            console.print(f"\n\n[bold]{len(SUBJECTS)} questions at once[/]")
            began = time.perf_counter()
            with ThreadPoolExecutor(len(SUBJECTS)) as pool:
                burst = list(pool.map(lambda i: ask(client, SUBJECTS[i], seed=i), range(len(SUBJECTS))))
            wall = time.perf_counter() - began
        report(console, [("one question", [single], single.total), (f"{len(burst)} at once", burst, wall)])
    except MillraceError as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1
    return 0


def ask(client: Client, prompt: str, seed: int, echo: Console | None = None) -> Answer:
    """Stream one answer and check that it is whole. Raises DemoFailed."""
    began = time.perf_counter()
    first, tokens = 0.0, 0
    with closing(client.stream(prompt, max_output_tokens=TOKENS, ignore_eos=True, seed=seed)) as events:
        for sequence, event in enumerate(events, 1):
            if event.sequence != sequence:
                raise DemoFailed(f"message {sequence} of the stream says it is {event.sequence}")
            first = first or (time.perf_counter() - began if event.deltas.choices else 0.0)
            tokens = event.completed.usage.output_tokens
            if echo:
                echo.print(new_text(event), end="", markup=False, soft_wrap=True)
    if tokens != TOKENS:
        raise DemoFailed(f"{TOKENS} tokens were asked for, {tokens} came")
    return Answer(tokens, first, time.perf_counter() - began)


@contextmanager
def server(console: Console) -> Iterator[str]:
    """Run `millrace serve` on free ports; yield its address; stop it by SIGTERM. Raises DemoFailed."""
    command = [sys.executable, "-m", "millrace.server.cli", "serve", "--port", "0", "--metrics-port", "0"]
    command += ["--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield wait_until_ready(process, console)
            process.send_signal(signal.SIGTERM)
            if status := process.wait(STOP_TIMEOUT):
                raise DemoFailed(f"the server ended with status {status}")
            console.print("The server stopped cleanly.", style="dim")
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the server did not stop within {STOP_TIMEOUT:.0f} seconds") from None
        finally:
            process.kill()


def wait_until_ready(process: "subprocess.Popen[str]", console: Console) -> str:
    """Its output says where it listens; if it ends instead, it has said why."""
    assert process.stdout
    for line in process.stdout:
        console.print(line.rstrip(), style="dim", markup=False)
        if found := READY.search(line):
            return found[1]
    raise DemoFailed(f"the server did not start (status {process.wait()})")


def report(console: Console, rows: list[tuple[str, list[Answer], float]]) -> None:
    table = Table("", "first token (median)", "worst", "tokens", "seconds", "tokens/s")
    for name, answers, wall in rows:
        first, tokens = [a.first for a in answers], sum(a.tokens for a in answers)
        table.add_row(
            name, f"{median(first) * 1e3:.0f} ms", f"{max(first) * 1e3:.0f} ms", str(tokens), f"{wall:.2f}",
            f"{tokens / wall:.0f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

"""`make demo`: start a server, ask it about documents, load it, stop it. Exit status 0 only if all went well."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from millrace.server.ask import source_line
from millrace.server.client import Client, new_text
from millrace.server.errors import MillraceError
from millrace.server.ingest import ingest
from millrace.server.local import local_server
from millrace.v1 import generation_pb2 as pb

DOCS = Path(__file__).resolve().parent.parent / "examples" / "docs"
COLLECTION = "shop"
# Questions to the documents, each with the one that has the answer and words of the answer.
QUESTIONS = (
    ("How long do I have to return a kettle?", "docs/returns-policy.md", "45 days"),
    ("For how many years are cast-iron pans guaranteed?", "docs/warranty.md", "10 years"),
    ("How long are phone calls kept?", "docs/privacy.html", "90 days"),
)
UNANSWERABLE = "Who painted the ceiling of the Sistine Chapel?"
REFUSAL = "I don't have enough information to answer that."
MASKED = ("Where do I write to if I have a complaint? I am jo@mail.example.", "@")

PROMPT = "What does a load balancer do? A load balancer"
SUBJECTS = ("A cache", "A queue", "A thread", "A token", "An index", "A server", "A client", "A lock") * 2
TOKENS = 64


class DemoFailed(MillraceError):
    pass


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from sending to the first text and to the end."""

    tokens: int
    first: float
    total: float


def main() -> int:
    console = Console(highlight=False)
    try:
        with (
            TemporaryDirectory() as data,
            local_server(f"--data-dir={data}", say=lambda line: dim(console, line)) as at,
            Client(at) as client,
        ):
            documents(client, console)
            generation(client, console)
        console.print("The server stopped cleanly.", style="dim")
    except MillraceError as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1
    return 0


def dim(console: Console, line: str) -> None:
    console.print(line, style="dim", markup=False)


def documents(client: Client, console: Console) -> None:
    """Ingest the example shop, ask it what it knows and what it does not."""
    console.print(f"\n[bold]Documents[/]: the {len(list(DOCS.iterdir()))} pages of a shop")
    if ingest(client, COLLECTION, [DOCS], console):
        raise DemoFailed("a document was refused")
    for question, document, words in QUESTIONS:
        text, citations = answer(client, question, console)
        if words not in text:
            raise DemoFailed(f"the answer to {question!r} lacks {words!r}: {text!r}")
        if document not in {citation.document_id for citation in citations}:
            raise DemoFailed(f"the answer to {question!r} does not cite {document}")
        check(client, text, citations)
    text, citations = answer(client, UNANSWERABLE, console)
    if text != REFUSAL or citations:
        raise DemoFailed(f"a question that the documents do not answer got {text!r}")
    question, hidden = MASKED
    text, _ = answer(client, question, console, mask_pii=True)
    if "[EMAIL]" not in text or hidden in text:
        raise DemoFailed(f"an e-mail address was not masked: {text!r}")


def answer(client: Client, question: str, console: Console, mask_pii: bool = False) -> tuple[str, list[pb.Citation]]:
    """Stream an answer to the console, and under it what it cites."""
    console.print(f"\n[cyan]{question}[/]{'  (personal data masked)' if mask_pii else ''}")
    text, citations = "", []
    with closing(client.stream(question, retrieval={"collection": COLLECTION}, mask_pii=mask_pii)) as events:
        for event in events:
            text += (new := new_text(event))
            console.print(new, end="", markup=False, soft_wrap=True)
            if event.HasField("citation"):
                citations.append(event.citation)
    console.print()
    for number in sorted({citation.source_number for citation in citations}):
        of_source = [citation for citation in citations if citation.source_number == number]
        dim(console, source_line(number, of_source))
    return text, citations


def check(client: Client, text: str, citations: Sequence[pb.Citation]) -> None:
    """Each citation's bytes of the document are the words of the answer that it is about."""
    answered = text.encode()
    for citation in citations:
        quoted = client.get_document(COLLECTION, citation.document_id, citation.byte_start, citation.byte_end).text
        about = answered[citation.text_start : citation.text_end].decode()
        if about != f"{quoted} [{citation.source_number}]":
            raise DemoFailed(f"{about!r} is not what {citation.source} says there: {quoted!r}")


def generation(client: Client, console: Console) -> None:
    """One prompt alone, then many at once, to the model itself."""
    console.print(f"\n[bold]One prompt[/]\n[cyan]{PROMPT}[/]", end="")
    single = generate(client, PROMPT, seed=0, echo=console)
    console.print(f"\n\n[bold]{len(SUBJECTS)} prompts at once[/]")
    began = time.perf_counter()
    with ThreadPoolExecutor(len(SUBJECTS)) as pool:
        burst = list(pool.map(lambda i: generate(client, SUBJECTS[i], seed=i), range(len(SUBJECTS))))
    wall = time.perf_counter() - began
    report(console, [("one prompt", [single], single.total), (f"{len(burst)} at once", burst, wall)])


def generate(client: Client, prompt: str, seed: int, echo: Console | None = None) -> Timing:
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
    return Timing(tokens, first, time.perf_counter() - began)


def report(console: Console, rows: list[tuple[str, list[Timing], float]]) -> None:
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

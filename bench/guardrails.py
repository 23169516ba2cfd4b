"""The guard for personal data: how fast it reads, and what it finds.

    python -m millrace.bench.guardrails [--labelled tests/gateway/guardrails/labelled.txt] [--mib 2]

First megabytes of UTF-8 a second on one core: of inspect() over a whole text, of a stream in pushes of 4
characters (about a token each), and of the plain patterns below by re2, which check nothing and do not stream.
Then precision and recall on labelled lines, where a finding counts if category, start and end are right.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import re2
from rich.console import Console
from rich.table import Table

from millrace.server.gateway.guardrails.pii import MASKS, PIIGuard

LABELLED = Path("tests/gateway/guardrails/labelled.txt")
PUSH = 4  # characters
LABEL = re.compile(rf"⟦({'|'.join(MASKS)}):(.*?)⟧")
# What is commonly written for these.
PLAIN = {
    "email": r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}",
    "phone": r"(?:\+?\d{1,3}[ .-]?)?\(?\d{3}\)?[ .-]?\d{3}[ .-]?\d{4}",
    "ssn": r"\b\d{3}-\d{2}-\d{4}\b",
    "card": r"\b(?:\d{4}[ -]?){3}\d{4}\b",
}
Spans = set[tuple[str, int, int]]


class Labelled(NamedTuple):
    """A text, and category, start and end of what must be masked in it."""

    text: str
    spans: list[tuple[str, int, int]]


def labelled(path: Path = LABELLED) -> list[Labelled]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse(line) for line in lines if line and not line.startswith("# ")]


def parse(line: str) -> Labelled:
    """`⟦email:a@b.example⟧` labels a span; `\\u200b` stands for that character."""
    line = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), line)
    text, spans, position = "", [], 0
    for match in LABEL.finditer(line):
        text += line[position : match.start()]
        spans.append((match[1], len(text), len(text) + len(match[2])))
        text, position = text + match[2], match.end()
    return Labelled(text + line[position:], spans)


def texts(characters: int) -> dict[str, str]:
    """Texts of one kind each, repeated to this length."""
    prose = "The mill race carries a fast current to the wheel, and the wheel turns the stone. "
    units = {
        "prose": prose,
        "prose, a match in 500 characters": 6 * prose + "Write to info@example.com or call +1 415 555 2671. ",
        "Japanese": "水車は速い流れを受けて回り、石臼を回します。",
        "log lines": "2026-11-21T12:34:56.789Z 192.168.100.20 GET /item/1234567890?x=415 200 0.000123\n",
        "tables of numbers": "4512 3312 5512 1234 9911 2003 6011 4433\n",
        "addresses only": "info@example.com ",
    }
    return {name: (unit * (characters // len(unit) + 1))[:characters] for name, unit in units.items()}


def rate(work: Callable[[str], object], text: str) -> float:
    """Megabytes of UTF-8 a second of CPU time, the better of two runs."""
    seconds = []
    for _ in range(2):
        started = time.process_time()
        work(text)
        seconds.append(time.process_time() - started)
    return len(text.encode()) / min(seconds) / 1e6


def stream(text: str) -> None:
    stage = PIIGuard().stream()
    for start in range(0, len(text), PUSH):
        stage.push(text[start : start + PUSH])
    stage.finish()


def plain(text: str) -> Spans:
    found = ((category, match) for category, pattern in PLAIN.items() for match in re2.finditer(pattern, text))
    return {(category, match.start(), match.end()) for category, match in found}


def guarded(text: str) -> Spans:
    return {(finding.category, finding.start, finding.end) for finding in PIIGuard().inspect(text)}


def speeds(characters: int) -> Table:
    table = Table("text", "inspect", f"stream by {PUSH}", "plain re2", title="MB/s on one core")
    for name, text in texts(characters).items():
        parts = text[: characters // 8]
        rates = (rate(guarded, text), rate(stream, parts), rate(plain, text))
        table.add_row(name, *(f"{value:.2f}" for value in rates))
    return table


def quality(lines: list[Labelled]) -> Table:
    table = Table("category", "labelled", "precision", "recall", "plain: precision", "recall")
    for category in (*MASKS, "all"):
        row = []
        for find in (guarded, plain):
            right = found = expected = 0
            for line in lines:
                labels = {span for span in line.spans if category in (span[0], "all")}
                spans = {span for span in find(line.text) if category in (span[0], "all")}
                right, found, expected = right + len(labels & spans), found + len(spans), expected + len(labels)
            row += [f"{right / max(found, 1):.3f}", f"{right / max(expected, 1):.3f}"]
        table.add_row(category, str(expected), *row)
    table.title = f"{len(lines)} lines, {sum(not line.spans for line in lines)} of them with nothing to find"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labelled", type=Path, default=LABELLED)
    parser.add_argument("--mib", type=float, default=2, help="of each text")
    arguments = parser.parse_args()
    console = Console()
    console.print(speeds(int(arguments.mib * 2**20)))
    if arguments.labelled.exists():
        console.print(quality(labelled(arguments.labelled)))
    else:
        console.print(f"{arguments.labelled} is missing: run this at the root of a checkout, or name it by --labelled")


if __name__ == "__main__":
    main()

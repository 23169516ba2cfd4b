"""Retrieval and extractive answers, through a real server.

    python -m millrace.bench.retrieval [--squad FILE] [--corpus FOLDER] [--chunks 20000] [--data-dir FOLDER]

Without --squad: the example shop and its questions. With it: the paragraphs of a file in the SQuAD 1.1 schema, each
a document, and its questions; --corpus adds documents of `docs-*.jsonl.xz` (one JSON object with `title` and `text`
a line) as distractors, until there are --chunks chunks in all. With --data-dir what was embedded once stays.

1. Which document has the answer? Recall@1, @5, @20, mean reciprocal rank and nDCG@10 (both within 20) of BM25, of
   vectors and of both fused, and the ratio to the better of the two.
2. Does the extractive answer contain the gold answer? How often is a question refused that the documents answer,
   and how often one whose document is filtered away?
"""

import argparse
import json
import lzma
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from millrace.server.client import Client, Document
from millrace.server.local import local_server
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import retrieval_pb2

MODES = ("lexical", "vector", "hybrid")
COLLECTION = "bench"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HOPELESS = 200  # questions asked without their documents, about
CALLERS = 2  # questions in flight
BATCH = 64  # documents of a corpus sent before the chunks are counted again


@dataclass(frozen=True, slots=True)
class Question:
    """`document`: the one that has the answer, None: none has. `answers`: spellings of it, any of which counts."""

    text: str
    document: str | None
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Rank of the right document for each question, from 1, None where it was not among 20; seconds each took."""

    ranks: list[int | None]
    seconds: list[float]

    def recall(self, k: int) -> float:
        return mean(rank is not None and rank <= k for rank in self.ranks)

    @property
    def mrr(self) -> float:
        return mean(1 / rank if rank else 0.0 for rank in self.ranks)

    @property
    def ndcg(self) -> float:
        """One document is right, so the ideal gain is 1."""
        return mean(1 / math.log2(1 + rank) if rank and rank <= 10 else 0.0 for rank in self.ranks)

    @property
    def measures(self) -> tuple[float, ...]:
        return self.recall(1), self.recall(5), self.recall(20), self.mrr, self.ndcg


def squad(path: Path) -> tuple[list[Document], list[Question]]:
    documents, questions = [], []
    for article in json.loads(path.read_text())["data"]:
        for number, paragraph in enumerate(article["paragraphs"]):
            document = Document(
                id=f"{article['title']}#{number}",
                source=f"{article['title']}.txt",
                content=paragraph["context"].encode(),
                metadata={"kind": "gold"},
            )
            documents.append(document)
            for qa in paragraph["qas"]:
                answers = tuple(answer["text"] for answer in qa["answers"])
                questions.append(Question(qa["question"], document.id, answers))
    return documents, questions


def shop() -> tuple[list[Document], list[Question]]:
    files = sorted(path for path in (EXAMPLES / "docs").iterdir() if path.is_file())
    documents = [Document(id=p.name, source=p.name, content=p.read_bytes(), metadata={"kind": "gold"}) for p in files]
    rows = map(json.loads, (EXAMPLES / "questions.jsonl").read_text().splitlines())
    questions = [
        Question(row["question"], row["document"], (row["answer"],) if row["document"] else ()) for row in rows
    ]
    return documents, questions


def corpus(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.glob("docs-*.jsonl.xz")):
        with lzma.open(path, "rt") as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                name = f"{path.name}#{number}"
                content = row["text"].encode()
                yield Document(
                    id=name,
                    source=f"{name}.md",
                    title=row["title"][:200],
                    content=content,
                    metadata={"kind": "distractor"},
                )


def fill(
    client: Client, documents: list[Document], distractors: Iterator[Document], chunks: int, console: Console
) -> None:
    """Ingest what is asked about, then distractors until there are `chunks` chunks."""
    began, count, embedded, tokens = time.perf_counter(), 0, 0, 0
    batch = documents
    while batch:
        with closing(client.upsert(COLLECTION, batch)) as results:
            for result in results:
                if result.status == retrieval_pb2.UPSERT_STATUS_FAILED:
                    raise SystemExit(f"{result.document_id}: {result.error_message}")
                count, embedded = count + result.chunks, embedded + result.chunks_embedded
                tokens += result.embedding_tokens
        if console.is_terminal:
            console.print(f"  {count} chunks", end="\r")
        batch = list(islice(distractors, BATCH)) if count < chunks else []
    seconds = time.perf_counter() - began
    (found,) = (c for c in client.collections() if c.name == COLLECTION)
    console.print(
        f"Collection: {found.documents} documents, {found.chunks} chunks, index {found.index}, "
        f"{found.embedding_model}. Ingested in {seconds:.1f} s"
        + (f": {embedded} chunks embedded, {tokens / seconds:,.0f} tokens/s." if embedded else ", none embedded anew.")
    )


def rank(client: Client, questions: list[Question], mode: str) -> Ranking:
    """By document: only the best chunk of each counts."""

    def one(question: Question) -> tuple[int | None, float]:
        began = time.perf_counter()
        answer = client.query(COLLECTION, question.text, top_k=20, mode=mode, without_text=True)
        seconds = time.perf_counter() - began
        order = list(dict.fromkeys(chunk.document_id for chunk in answer.chunks))
        return (order.index(question.document) + 1 if question.document in order else None), seconds

    found = list(map(one, questions))
    return Ranking([rank for rank, _ in found], [seconds for _, seconds in found])


def report_ranking(console: Console, rankings: dict[str, Ranking]) -> None:
    table = Table("", "recall@1", "recall@5", "recall@20", "MRR", "nDCG@10", "median ms")
    for mode, ranking in rankings.items():
        table.add_row(mode, *(f"{value:.3f}" for value in ranking.measures), f"{median(ranking.seconds) * 1e3:.1f}")
    best = [max(pair) for pair in zip(rankings["lexical"].measures, rankings["vector"].measures, strict=True)]
    ratios = (
        ours / other if other else math.nan for ours, other in zip(rankings["hybrid"].measures, best, strict=True)
    )
    table.add_row("hybrid : better of the two", *(f"{ratio:.3f}x" for ratio in ratios), "")
    console.print(table)


def answer(client: Client, question: Question, filters: dict[str, str]) -> pb.GenerateResponse:
    retrieval = {"collection": COLLECTION, "answer_mode": "extractive", "filter": filters}
    return client.generate(question.text, retrieval=retrieval)


def refused(response: pb.GenerateResponse) -> bool:
    return response.choices[0].finish.reason == pb.FINISH_REASON_NO_SUPPORT


def report_answers(
    client: Client, questions: list[Question], hopeless: list[tuple[Question, dict[str, str]]], console: Console
) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        began = time.perf_counter()
        answers = list(pool.map(lambda question: answer(client, question, {}), questions))
        seconds = (time.perf_counter() - began) / len(questions)
        lost = list(pool.map(lambda pair: answer(client, *pair), hopeless))
    contained = mean(
        any(gold.casefold() in response.choices[0].text.casefold() for gold in question.answers)
        for question, response in zip(questions, answers, strict=True)
    )
    table = Table("extractive answers", "share")
    table.add_row("contain the gold answer", f"{contained:.3f}")
    table.add_row("of a question with an answer: refused", f"{mean(map(refused, answers)):.3f}")
    if lost:
        table.add_row("of a question without one: refused", f"{mean(map(refused, lost)):.3f}")
    table.add_row("words in the median answer", f"{median(len(a.choices[0].text.split()) for a in answers):.0f}")
    table.add_row(f"seconds each, {CALLERS} at once", f"{seconds:.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--questions", type=int, help="a random sample of this many")
    arguments = parser.parse_args()
    documents, questions = squad(arguments.squad) if arguments.squad else shop()
    distractors = corpus(arguments.corpus) if arguments.corpus else iter(())
    if arguments.questions:
        questions = random.Random(0).sample(questions, min(arguments.questions, len(questions)))
    known = [question for question in questions if question.document]
    hopeless: list[tuple[Question, dict[str, str]]] = [
        (question, {}) for question in questions if not question.document
    ]
    if arguments.corpus and not hopeless:  # every question has an answer: take it away, only distractors may be quoted
        every = max(1, len(known) // HOPELESS)
        hopeless = [(question, {"kind": "distractor"}) for question in known[::every]]
    console = Console()
    with TemporaryDirectory() as temporary:
        data_dir = arguments.data_dir or Path(temporary)
        flags = [f"--data-dir={data_dir}", f"--chunk-tokens={arguments.chunk_tokens}"]
        with local_server(*flags) as address, Client(address) as client:
            fill(client, documents, distractors, arguments.chunks if arguments.corpus else 0, console)
            report_ranking(console, {mode: rank(client, known, mode) for mode in MODES})
            report_answers(client, known, hopeless, console)


if __name__ == "__main__":
    main()

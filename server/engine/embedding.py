"""The embedding engine: texts in, vectors out, one step at a time. The thread of the engine calls it."""

import logging

import numpy as np

from millrace.server.config import EngineConfig
from millrace.server.engine.engine import HOPELESS, StepOutput
from millrace.server.engine.sequence import SequenceFinished
from millrace.server.engine.texts import TextQueue, TextRequest, TextVector
from millrace.server.engine.validation import checked_text
from millrace.server.errors import InternalError
from millrace.server.model.executors.base import Executor, Float32
from millrace.server.model.executors.texts import pack_texts
from millrace.server.types import EmbedderInfo

log = logging.getLogger(__name__)

MAX_STEP_TEXTS = 256  # so that the vectors of a step are a message of a few MiB, however short the texts


class EmbeddingEngine:
    """Embeds texts on an executor, which it owns from now on.

    Service is in order of arrival, texts that somebody waits for before those of the background. They never
    share a step, so that a question does not wait for documents; and each of the two has the queue's bounds to
    itself, so that documents do not keep questions out.
    """

    def __init__(self, executor: Executor, info: EmbedderInfo, config: EngineConfig):
        self.info = info
        self._executor = executor
        self._urgent = TextQueue(config.max_queued_requests, config.max_queued_tokens)
        self._background = TextQueue(config.max_queued_requests, config.max_queued_tokens)
        self._steps = 0
        self._hopeless = 0

    @property
    def has_work(self) -> bool:
        return bool(self._urgent or self._background)

    @property
    def is_urgent(self) -> bool:
        """Whether a text waits that is not of the background."""
        return bool(self._urgent)

    @property
    def progress(self) -> int:
        """Grows with every layer and every step; any thread may read it."""
        return self._executor.progress + self._steps

    def submit(self, *texts: TextRequest) -> None:
        """Queue the texts of one request, all of them or none. Raises InvalidRequest, PromptTooLong or QueueFull."""
        checked = [checked_text(text, self.info) for text in texts]
        queue = self._background if texts[0].background else self._urgent
        queue.add(checked)

    def cancel(self, sequence_id: int) -> None:
        """Drop a text that waits. An unknown one is ignored."""
        self._urgent.discard(sequence_id)
        self._background.discard(sequence_id)

    def step(self, budget: int, output: StepOutput) -> None:
        """Embed whole texts of together at most `budget` tokens, but one at least; adds what is new to `output`.

        A step that fails is run again in halves until the culprits stand alone; they finish with an
        InternalError. Raises what the executor raised once nothing succeeds any more.
        """
        self._steps += 1
        texts = (self._urgent or self._background).take(MAX_STEP_TEXTS, budget)
        try:
            self._run(texts, output)
            self._hopeless = 0
        except Exception as error:
            log.exception("embedding %d texts failed; running them again in halves", len(texts))
            all_failed = self._isolate(texts, error, output) == len(texts)
            self._hopeless = self._hopeless + 1 if all_failed else 0
            if self._hopeless == HOPELESS:
                raise

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        self._urgent.check()
        self._background.check()

    def close(self) -> None:
        """Release the executor. Idempotent."""
        self._executor.close()

    def _run(self, texts: list[TextRequest], output: StepOutput) -> None:
        """Raises before it adds anything to `output`, or not at all."""
        ticket = self._executor.submit(pack_texts([text.token_ids for text in texts]))
        result = self._executor.collect(ticket)
        if missing := set(range(len(texts))) - result.pooled.keys() - result.errors.keys():
            raise ValueError(f"no vector came of the texts {sorted(missing)} of {len(texts)}")
        for row, text in enumerate(texts):
            fault = result.errors.get(row) or fault_of(result.pooled[row], self.info.dimensions)
            if fault:
                log.error("request %s fails the embedder: %s", text.request_id, fault)
                output.finished.append(failure(text, fault))
            else:
                output.embedded.append(TextVector(text.sequence_id, result.pooled[row]))

    def _isolate(self, texts: list[TextRequest], error: Exception, output: StepOutput) -> int:
        """Run each half of texts that failed together; returns how many of them fail even alone."""
        if len(texts) == 1:
            output.finished.append(failure(texts[0], repr(error)))
            return 1
        failed = 0
        for half in (texts[: len(texts) // 2], texts[len(texts) // 2 :]):
            try:
                self._run(half, output)
            except Exception as cause:
                failed += self._isolate(half, cause, output)
        return failed


def fault_of(vector: Float32, dimensions: int) -> str | None:
    """What is wrong with a vector that an executor returned."""
    if vector.shape != (dimensions,):
        return f"a vector of shape {vector.shape} came, not {(dimensions,)}"
    return None if np.isfinite(vector).all() else "a vector came that is not finite"


def failure(text: TextRequest, fault: str) -> SequenceFinished:
    return SequenceFinished(text.sequence_id, None, error=InternalError(f"the embedder failed: {fault}"))

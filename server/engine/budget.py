"""How much of the prompts a step takes: bounded in tokens, and in the time that they are expected to take."""

from millrace.server.engine.plan import Limits
from millrace.server.engine.sequence import Sequence
from millrace.server.engine.step_time import LEAST_CHUNK, StepTime, Work


class Budget:
    """What is left of a step beside the work that it has. `tokens` 0: it is full."""

    def __init__(self, limits: Limits, step_time: StepTime, work: Work):
        self.tokens = limits.max_num_batched_tokens - work.decoding
        self._step_time = step_time
        self._left_us: float | None = None
        self._least = LEAST_CHUNK
        if limits.max_step_us is not None:
            self._left_us = limits.max_step_us - step_time.predict(work)
            self.tokens = min(self.tokens, step_time.first_guess)

    def take(self, sequence: Sequence) -> int:
        """How many of a sequence's next tokens the step takes, which are gone from the budget."""
        start = sequence.scheduled
        wanted = min(self.tokens, sequence.length - start)
        count = wanted
        if self._left_us is not None:
            count = self._step_time.chunk(self._left_us, start, wanted)
            if count < wanted:
                count = max(count - count % LEAST_CHUNK, min(wanted, max(1, self._least)))
                self.tokens = count  # its time is used up
            self._left_us -= self._step_time.chunk_us(start, count)
            self._least = max(0, self._least - count)
        self.tokens -= count
        return count

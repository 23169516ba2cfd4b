"""How much of the prompts a step takes: bounded in tokens, and in the time that they are expected to take."""

from millrace.server.engine.plan import Limits
from millrace.server.engine.sequence import Sequence
from millrace.server.engine.step_time import LEAST_CHUNK, StepTime, Work


def room_us(limits: Limits, step_time: StepTime, work: Work) -> float:
    """The time that a step has for prompts beside its work, not below that of LEAST_CHUNK.

    Where nobody decodes, prompts may take as long as what every step takes: nobody's stream is held by it.
    """
    if limits.max_step_us is None:
        return step_time.chunk_us(0, limits.max_num_batched_tokens)
    taken = step_time.predict(work)
    room = limits.max_step_us - taken
    return max(room, step_time.chunk_us(0, LEAST_CHUNK), 0.0 if work.decoding else taken)


class Budget:
    """What is left of a step beside the work that it has. `tokens` 0: it is full."""

    def __init__(self, limits: Limits, step_time: StepTime, work: Work):
        self.tokens = limits.max_num_batched_tokens - work.decoding
        self._step_time = step_time
        self._left_us: float | None = None
        self._least = LEAST_CHUNK
        if limits.max_step_us is not None:
            self._left_us = room_us(limits, step_time, work)
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

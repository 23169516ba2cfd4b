"""How long a step takes, learned from the steps that were: it bounds them, and says what a deadline allows.

    time = base + prefill · prompt tokens + decode · decoding rows + attention · Σ tokens x context,    all >= 0

by least squares that forget, solved by projected coordinate descent: the few steps that matter are the latest ones.
"""

from typing import NamedTuple

SCALES = (1.0, 64.0, 8.0, 65_536.0)  # of the four quantities, so that their sums are alike
FORGET = 0.98  # weight of what was known, with each step
RIDGE = 1e-3
SWEEPS = 2
SURPRISE = 4.0  # a step that took this many times what was expected counts as that
COLD = 2  # first steps, which compile and touch memory for the first time, and say nothing
FAMILIAR = 16  # steps after which an expectation is one
DOUBT = 0.9
FIRST_CHUNK = 32  # prompt tokens of the first step; each later one may have as many as were seen, and these
LEAST_CHUNK = 16  # prompt tokens that a step takes even if its time is used up: prompts advance, whatever decodes
UNLIMITED = 1 << 40  # of whatever is counted: no bound


class Work(NamedTuple):
    """What a step computes; `attention` is the sum over its tokens of the tokens that each looks at."""

    prompt_tokens: int
    decoding: int
    attention: int


class StepTime:
    """Microseconds."""

    def __init__(self) -> None:
        self._products = [[RIDGE if i == j else 0.0 for j in range(4)] for i in range(4)]
        self._sums = [0.0] * 4
        self._costs = [0.0] * 4  # of the scaled quantities
        self._steps = 0
        self._prompt_tokens = 0

    @property
    def is_known(self) -> bool:
        """Whether enough steps were seen to refuse somebody for what they say."""
        return self._steps >= COLD + FAMILIAR

    @property
    def first_guess(self) -> int:
        """Prompt tokens that a step may have for what is known of them."""
        return FIRST_CHUNK + self._prompt_tokens if self._prompt_tokens < 8 * FIRST_CHUNK else UNLIMITED

    def observe(self, work: Work, elapsed_us: int) -> None:
        """A step of that work took that long."""
        self._steps += 1
        self._prompt_tokens += work.prompt_tokens
        if self._steps <= COLD:
            return
        expected = self.predict(work)
        if self.is_known and expected > 0:
            elapsed_us = min(elapsed_us, round(SURPRISE * expected))
        x = (1.0, work.prompt_tokens / SCALES[1], work.decoding / SCALES[2], work.attention / SCALES[3])
        for i, row in enumerate(self._products):
            a = x[i]
            row[0] = FORGET * row[0] + a * x[0]
            row[1] = FORGET * row[1] + a * x[1]
            row[2] = FORGET * row[2] + a * x[2]
            row[3] = FORGET * row[3] + a * x[3]
            row[i] += RIDGE * (1 - FORGET)
            self._sums[i] = FORGET * self._sums[i] + a * elapsed_us
        for _ in range(SWEEPS):
            self._sweep()

    def predict(self, work: Work) -> float:
        """Of one step."""
        base, prompt, decode, attention = self._costs
        return (
            base
            + prompt * (work.prompt_tokens / SCALES[1])
            + decode * (work.decoding / SCALES[2])
            + attention * (work.attention / SCALES[3])
        )

    def chunk(self, left_us: float, start: int, wanted: int) -> int:
        """How many tokens of a prompt, from `start`, fit into the time that is left of a step; at most `wanted`."""
        token, attention = self._costs[1] / SCALES[1], self._costs[3] / SCALES[3]
        linear, square = token + attention * start, attention / 2
        if linear <= 0 and square <= 0:
            return wanted
        if left_us <= 0:
            return 0
        # square · n² + linear · n = left_us, by the formula that does not cancel.
        most = 2 * left_us / (linear + (linear * linear + 4 * square * left_us) ** 0.5)
        return min(wanted, int(most))

    def chunk_us(self, start: int, count: int) -> float:
        """What tokens [start, start + count) of a prompt add to a step."""
        return self._costs[1] * (count / SCALES[1]) + self._costs[3] * (count * (start + count / 2) / SCALES[3])

    def doubt(self) -> None:
        """Trust what is known a little less."""
        self._sums = [DOUBT * one for one in self._sums]
        self._costs = [DOUBT * one for one in self._costs]

    def backlog_us(self, prompt_tokens: int, output_tokens: int, lanes: int) -> float:
        """What so many tokens take when `lanes` sequences decode together."""
        base, prompt, decode, _ = self._costs
        return prompt * (prompt_tokens / SCALES[1]) + output_tokens * (base / max(1, lanes) + decode / SCALES[2])

    def _sweep(self) -> None:
        costs = self._costs
        for i, row in enumerate(self._products):
            whole = row[0] * costs[0] + row[1] * costs[1] + row[2] * costs[2] + row[3] * costs[3]
            costs[i] = max(0.0, (self._sums[i] - whole) / row[i] + costs[i])

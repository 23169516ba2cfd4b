"""The work that engines are compared by, and how its speed is measured: the same for every engine that has steps.

Only the standard library: peers run it in environments of their own.

- prefill: one request, its first token;
- decode: so many requests at once, from the moment when all of them have begun to the first that ends;
- mixed: many requests at once, from the first step to the last token, output tokens only.

Tokens are drawn at random and never twice the same, so nobody finds a prompt in a cache.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

FIRST_ID, LAST_ID = 300, 500  # tokens of every prompt: no special ones in any vocabulary of the bench


@dataclass(frozen=True, slots=True)
class Workload:
    """In tokens. The defaults are those of the published tables."""

    prefill: int = 512
    batches: tuple[int, ...] = (1, 8, 32)
    decode_prompt: int = 64
    decode_output: int = 32
    requests: int = 32
    request_prompt: int = 256
    request_output: int = 64
    step_tokens: int = 2048  # that an engine may take in one step
    repeats: int = 2  # of the prefill, of which the best counts
    single_repeats: int = 6  # of decoding one request, which memory bounds: it may come and go; the best counts

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        decode, mixed = self.decode_prompt + self.decode_output, self.request_prompt + self.request_output
        return max(self.prefill + 1, decode, mixed)

    @property
    def sequences(self) -> int:
        """That run at once, at most."""
        return max(self.requests, *self.batches)

    @property
    def cached_tokens(self) -> int:
        """In the KV cache at once, at most."""
        decode = max(self.batches) * (self.decode_prompt + self.decode_output)
        return max(self.prefill + 1, decode, self.requests * (self.request_prompt + self.request_output))

    def repeats_of(self, batch: int) -> int:
        """Of decoding; larger batches are their own average."""
        return self.single_repeats if batch == 1 else 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        values = json.loads(text)
        return cls(**values | {"batches": tuple(values["batches"])})


@dataclass(slots=True)
class Speeds:
    """Tokens per second; None: not measured."""

    prefill: float | None = None
    decode: dict[int, float] = field(default_factory=dict)  # by batch
    mixed: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"prefill": self.prefill, "decode": {str(k): v for k, v in self.decode.items()}, "mixed": self.mixed}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Speeds":
        return cls(values["prefill"], {int(k): v for k, v in values["decode"].items()}, values["mixed"])


class Stepper(Protocol):
    """An engine that takes requests and does a step when told."""

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Queue a request, greedy, that yields exactly so many tokens."""
        ...

    def step(self) -> Sequence[int]:
        """Do something; the request of each token that is new, in any order."""
        ...


class Meter:
    def __init__(self, stepper: Stepper, clock: Callable[[], float] = time.perf_counter):
        self._stepper, self._clock = stepper, clock
        self._random, self._next = random.Random(0), 0

    def measure(self, work: Workload, beside: Callable[[int], object] = lambda batch: None) -> Speeds:
        """Before each batch a short one of its size, so that nobody pays for what happens once. `beside` is called
        before each decoding of a batch and after the last."""
        self._run(1, work.decode_prompt, 2)
        speeds = Speeds()
        speeds.prefill = max(work.prefill / self._run(1, work.prefill, 1)[-1][0] for _ in range(work.repeats))
        for batch in work.batches:
            self._run(batch, work.decode_prompt, 2)
            speeds.decode[batch] = 0
            for _ in range(work.repeats_of(batch)):
                beside(batch)
                speeds.decode[batch] = max(speeds.decode[batch], self.decode(batch, work))
            beside(batch)
        speeds.mixed = self.mixed(work)
        return speeds

    def mixed(self, work: Workload) -> float:
        """Output tokens per second, prompts included in the time; not those of one short request before."""
        self._run(1, work.decode_prompt, 2)
        end = self._run(work.requests, work.request_prompt, work.request_output)[-1][0]
        return work.requests * work.request_output / end

    def decode(self, batch: int, work: Workload) -> float:
        """Tokens per second of the steps in which every request of the batch decodes."""
        counts: Counter[int] = Counter()
        begun = ended = None
        tokens = 0
        for seconds, requests in self._run(batch, work.decode_prompt, work.decode_output):
            counts.update(requests)
            if begun is not None and ended is None:
                tokens += len(requests)
            if begun is None and len(counts) == batch:
                begun = seconds
            if ended is None and max(counts.values(), default=0) >= work.decode_output:
                ended = seconds
        if begun is None or ended is None or not tokens:
            raise ValueError(f"no step had all {batch} requests in it: decode_output is too short")
        return tokens / (ended - begun)

    def _run(self, requests: int, prompt: int, output: int) -> list[tuple[float, Sequence[int]]]:
        """Do so many requests; for each step the seconds from the start to its end, and the tokens' requests."""
        for _ in range(requests):
            ids = [self._random.randint(FIRST_ID, LAST_ID) for _ in range(prompt)]
            self._stepper.add(self._next, ids, output)
            self._next += 1
        steps: list[tuple[float, Sequence[int]]] = []
        missing, start = requests * output, self._clock()
        while missing > 0:
            found = self._stepper.step()
            missing -= len(found)
            steps.append((self._clock() - start, found))
        return steps

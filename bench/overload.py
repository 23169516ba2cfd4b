"""What becomes of requests with deadlines when more come than can be served: `python -m millrace.bench.overload`.

A whole server. First what it serves of as many callers as it runs at once; then requests at random times, 1, 3 and 10
times as many, each with a deadline. Goodput: answers that were whole in time. First come first served: the same server,
which is not told the deadlines; its callers give up at theirs. Answers are as long as their limits say, so that the
server knows what each will take.
"""

import argparse
import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import grpc.aio

from millrace.bench.checkpoints import work_directory
from millrace.bench.engine import locate
from millrace.bench.serving import server_flags
from millrace.bench.workload import FIRST_ID, LAST_ID
from millrace.server.config import EngineConfig
from millrace.server.errors import MillraceError
from millrace.server.local import local_server
from millrace.v1 import generation_pb2 as pb
from millrace.v1.generation_pb2_grpc import GenerationServiceStub

PROMPT, OUTPUT = (50, 400), (20, 120)  # tokens, drawn evenly
PATIENCE = (1.0, 2.5)  # deadline, in times of an answer when the server is just full
LANES = 16
AT_ONCE = 0.05  # seconds within which a refusal should come
LOADS = (1, 3, 10)
REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class Request:
    """`at`: seconds from the beginning. `patience`: its deadline, in times of an answer when all lanes are taken."""

    at: float
    patience: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Answer:
    """`seconds` until it ended; a refusal is told before anything ran. `counts`: it ended while requests still came."""

    seconds: float
    in_time: bool
    refused: bool = False
    counts: bool = True


@dataclass(frozen=True)
class Outcome:
    load: float
    knows: bool  # the server knows the deadlines
    seconds: float
    answers: Sequence[Answer]

    @property
    def goodput(self) -> float:
        return sum(answer.in_time and answer.counts for answer in self.answers) / self.seconds

    @property
    def refusals(self) -> list[float]:
        return sorted(answer.seconds for answer in self.answers if answer.refused)

    @property
    def p99(self) -> float:
        """Seconds, of the refusals by nearest rank; 0 where there are none."""
        refusals = self.refusals
        return refusals[math.ceil(0.99 * len(refusals)) - 1] if refusals else 0.0


def poisson(rate: float, seconds: float, seed: int) -> Iterator[Request]:
    """The same requests for the same seed, whatever becomes of them."""
    r, at = random.Random(seed), 0.0
    while (at := at + r.expovariate(rate)) < seconds:
        yield Request(at, r.uniform(*PATIENCE), r.randint(*PROMPT), r.randint(*OUTPUT))


class Callers:
    """Sends requests whose prompts are never twice the same, and retries none."""

    def __init__(self, address: str):
        self._channel = grpc.aio.insecure_channel(address, (("grpc.enable_retries", 0),))
        self._generate = GenerationServiceStub(self._channel).StreamGenerate
        self._draw = random.Random(0)

    async def ask(self, request: Request, end: float, deadline: float | None = None, *, tell: bool = True) -> Answer:
        """What becomes of a request; None: it is waited for. Without `tell` the caller alone knows the deadline."""
        message = pb.GenerateRequest(
            model="bench",
            token_ids=pb.TokenIds(ids=self._draw.choices(range(FIRST_ID, LAST_ID), k=request.prompt)),
            sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StoppingCriteria(max_output_tokens=request.output, ignore_eos=True),
        )
        start, has_begun = time.perf_counter(), False
        try:
            async with asyncio.timeout(None if tell else deadline):
                call = self._generate(message, timeout=deadline if tell else None)
                async for _ in call:
                    has_begun = True
        except TimeoutError:
            return Answer(time.perf_counter() - start, False)
        except grpc.aio.AioRpcError as error:
            if error.code() not in REFUSALS:
                raise
            seconds = time.perf_counter() - start
            is_over = deadline is not None and seconds >= deadline
            return Answer(seconds, False, refused=not has_begun and not is_over)
        now = time.perf_counter()
        return Answer(now - start, True, counts=now <= end)

    async def as_many_as_run(self, seconds: float, seed: int) -> tuple[float, float]:
        """Answers a second, and the seconds of one, when there is always another request."""
        requests, answers = poisson(1000, 3600, seed), []
        end = time.perf_counter() + seconds

        async def caller() -> None:
            while time.perf_counter() < end:
                answers.append(await self.ask(next(requests), end))

        await asyncio.gather(*(caller() for _ in range(LANES)))
        return sum(answer.counts for answer in answers) / seconds, mean(answer.seconds for answer in answers)

    async def at_random(self, load: float, rate: float, one: float, seconds: float, *, tell: bool) -> Outcome:
        """Requests of a Poisson process for so long, and what became of each."""
        asked, start = [], time.perf_counter()
        for request in poisson(load * rate, seconds, 1):
            await asyncio.sleep(start + request.at - time.perf_counter())
            asked.append(asyncio.create_task(self.ask(request, start + seconds, one * request.patience, tell=tell)))
        return Outcome(load, tell, seconds, await asyncio.gather(*asked))

    async def close(self) -> None:
        await self._channel.close()


async def measure(address: str, seconds: float) -> tuple[float, float, list[Outcome]]:
    callers = Callers(address)
    try:
        await callers.as_many_as_run(seconds / 4, 2)  # the server learns what its steps take
        rate, one = await callers.as_many_as_run(seconds, 3)
        outcomes = [await callers.at_random(3, rate, one, seconds, tell=False)]
        outcomes += [await callers.at_random(load, rate, one, seconds, tell=True) for load in LOADS]
        return rate, one, outcomes
    finally:
        await callers.close()


def report(rate: float, one: float, outcomes: Sequence[Outcome]) -> None:
    print(f"served of {LANES} callers: {rate:.2f} answers/s, {one:.1f} s each; deadlines of {PATIENCE} times that")
    print(f"{'load':<28}{'sent':>6}{'in time/s':>11}{'refused':>9}{'p99 ms':>8}{'too late':>10}")
    for outcome in outcomes:
        name = f"{outcome.load:g}x" + ("" if outcome.knows else ", first come first served")
        refused, good = len(outcome.refusals), sum(answer.in_time for answer in outcome.answers)
        late = len(outcome.answers) - refused - good
        numbers = f"{len(outcome.answers):>6}{outcome.goodput:>11.2f}{refused:>9}{1e3 * outcome.p99:>8.0f}{late:>10}"
        print(f"{name:<28}{numbers}")
    fcfs, *ours = outcomes
    at = {outcome.load: outcome for outcome in ours}
    peak = max(outcome.goodput for outcome in ours)
    gain = at[3].goodput / fcfs.goodput if fcfs.goodput else float("inf")
    print(f"3x, to first come first served: {gain:.2f} (asked: at least 1.3)")
    print(f"10x, to the best load: {at[10].goodput / peak:.2f} (asked: at least 0.9)")
    print(f"10x, refusals at p99: {1e3 * at[10].p99:.0f} ms (asked: at most {1e3 * AT_ONCE:.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="qwen2.5-0.5b", help="a shape of random weights, or a directory")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--seconds", type=float, default=60, help="of each part")
    parser.add_argument("--work-dir", type=Path, default=work_directory())
    options = parser.parse_args()
    try:
        config = EngineConfig(
            model=str(locate(options.model, options.work_dir)[0]),
            embedding_model="off",
            quantization=options.quantization,
            max_model_len=PROMPT[1] + OUTPUT[1],
            max_num_seqs=LANES,
        )
        flags = [*server_flags(config), "--served-model-name=bench", "--max-concurrent-requests=100000"]
        with local_server(*flags) as address:
            result = asyncio.run(measure(address, options.seconds))
        print(f"{options.model}, {options.quantization}")
        report(*result)
    except (MillraceError, ValueError, OSError) as error:
        parser.exit(1, f"overload: {error}\n")


if __name__ == "__main__":
    main()

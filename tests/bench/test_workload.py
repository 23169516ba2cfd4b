"""Speeds come out as the clock and the engine's steps say."""

from collections.abc import Sequence

import pytest

from millrace.bench.workload import Meter, Speeds, Workload

PREFILL_SECONDS, DECODE_SECONDS = 0.01, 0.25  # per token of a prompt; per step
WORK = Workload(
    prefill=50, batches=(1, 4), decode_prompt=10, decode_output=8, requests=6, request_prompt=20, request_output=5
)


class Fake:
    """Takes one prompt a step, beside which the others decode; its clock knows what that costs."""

    def __init__(self) -> None:
        self.now, self.slow = 0.0, 1
        self.waiting: list[tuple[int, int, int]] = []
        self.running: dict[int, int] = {}
        self.prompts: list[tuple[int, ...]] = []

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        self.waiting.append((request, len(prompt), output_tokens))
        self.prompts.append(tuple(prompt))

    def step(self) -> list[int]:
        found = list(self.running)
        self.now += self.slow * DECODE_SECONDS if found else 0
        if self.waiting:
            request, prompt, output = self.waiting.pop(0)
            self.now += prompt * PREFILL_SECONDS
            self.running[request] = output
            found.append(request)
        for request in found:
            self.running[request] -= 1
        self.running = {request: left for request, left in self.running.items() if left}
        return found


@pytest.fixture
def measured() -> tuple[Fake, Speeds]:
    fake = Fake()
    return fake, Meter(fake, lambda: fake.now).measure(WORK)


def test_prefill_is_the_time_to_the_first_token(measured: tuple[Fake, Speeds]) -> None:
    assert measured[1].prefill == pytest.approx(1 / PREFILL_SECONDS)


def test_decode_counts_only_steps_in_which_all_decode(measured: tuple[Fake, Speeds]) -> None:
    assert measured[1].decode == pytest.approx({1: 1 / DECODE_SECONDS, 4: 4 / DECODE_SECONDS})


def test_mixed_counts_output_from_the_first_step_to_the_last_token(measured: tuple[Fake, Speeds]) -> None:
    seconds = 6 * 20 * PREFILL_SECONDS + (5 + 5 - 1) * DECODE_SECONDS  # the first prompt alone, then a step for each
    assert measured[1].mixed == pytest.approx(6 * 5 / seconds)


def test_no_prompt_comes_twice(measured: tuple[Fake, Speeds]) -> None:
    prompts = measured[0].prompts
    assert (
        len(set(prompts)) == len(prompts) == 1 + 2 + (1 + 6 * 1) + (4 + 4) + (1 + 6)
    )  # prefill, each batch and mixed, warmed up


def test_the_best_decoding_of_one_request_counts_with_the_memory_beside_it() -> None:
    fake, asked = Fake(), []

    def beside(batch: int) -> None:
        asked.append(batch)
        fake.slow = 1 if len(asked) == 3 else 4

    speeds = Meter(fake, lambda: fake.now).measure(WORK, beside)
    assert asked == [1] * 7 + [4] * 2
    assert speeds.decode == pytest.approx({1: 1 / DECODE_SECONDS, 4: 1 / DECODE_SECONDS})


def test_a_batch_that_is_never_whole_is_no_measurement() -> None:
    work = Workload(batches=(8,), decode_output=2)
    fake = Fake()
    with pytest.raises(ValueError, match="no step had all 8 requests"):
        Meter(fake, lambda: fake.now).decode(8, work)


def test_work_and_speeds_survive_json() -> None:
    assert Workload.from_json(WORK.to_json()) == WORK
    speeds = Speeds(1.5, {1: 2.0, 32: 4.0}, None)
    assert Speeds.from_json(speeds.to_json()) == speeds

import random

import pytest

from millrace.server.engine.step_time import COLD, FAMILIAR, FIRST_CHUNK, StepTime, Work


def learned(cost, noise: float = 0.0, steps: int = 300, seed: int = 0) -> StepTime:
    """After steps of all kinds that took `cost(work)`, more or less."""
    r, model = random.Random(seed), StepTime()
    for _ in range(steps):
        prompt, decoding = r.choice((0, 16, 64)), r.choice((1, 4, 32))
        work = Work(prompt, decoding, decoding * r.randint(50, 900) + prompt * r.randint(30, 500))
        model.observe(work, round(cost(work) * r.uniform(1 - noise, 1 + noise)))
    return model


def plain(work: Work) -> float:
    return 24_000 + 2_600 * work.prompt_tokens + 2_700 * work.decoding + 0.4 * work.attention


@pytest.mark.parametrize(("noise", "tolerance"), [(0, 0.02), (0.2, 0.2)])
@pytest.mark.parametrize("seed", range(5))
def test_what_steps_cost_is_learned(noise, tolerance, seed):
    model = learned(plain, noise, seed=seed)
    for work in (Work(0, 1, 100), Work(0, 32, 20_000), Work(64, 0, 9_000), Work(48, 8, 30_000)):
        assert model.predict(work) == pytest.approx(plain(work), rel=tolerance)


def test_a_machine_that_slows_down_is_noticed():
    model = learned(plain)
    for step in range(150):
        model.observe(
            Work(16 * (step % 3), 4 + step % 5, 4_000), round(3 * plain(Work(16 * (step % 3), 4 + step % 5, 4_000)))
        )
    work = Work(16, 6, 4_000)
    assert model.predict(work) == pytest.approx(3 * plain(work), rel=0.1)


def test_one_step_that_hangs_is_no_new_rule():
    model = learned(plain)
    before = model.predict(Work(16, 4, 4_000))
    model.observe(Work(16, 4, 4_000), 1000 * round(before))
    assert model.predict(Work(16, 4, 4_000)) < 1.3 * before


def test_chunks_take_the_time_that_is_left_and_no_more():
    model = learned(plain)
    for left in (10_000, 100_000, 1_000_000):
        for start in (0, 700, 5_000):
            count = model.chunk(left, start, 10_000)
            assert model.chunk_us(start, count) <= left * 1.001
            assert model.chunk_us(start, count + 1) > left * 0.999
    assert model.chunk(1e9, 0, 7) == 7
    assert model.chunk(-5, 0, 7) == 0
    assert StepTime().chunk(1, 0, 7) == 7, "nothing is known"


def test_first_steps_are_careful_and_the_very_first_say_nothing():
    model = StepTime()
    assert model.first_guess == FIRST_CHUNK
    for _ in range(COLD):
        model.observe(Work(32, 0, 500), 10_000_000)
    assert model.predict(Work(32, 0, 500)) == 0
    assert FIRST_CHUNK < model.first_guess < 200
    for _ in range(FAMILIAR):
        assert not model.is_known
        model.observe(Work(32, 0, 500), 1_000)
    assert model.is_known
    assert model.first_guess > 10_000
    assert model.predict(Work(32, 0, 500)) == pytest.approx(1_000, rel=0.05)

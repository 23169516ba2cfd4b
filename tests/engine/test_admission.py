"""Who is refused for a deadline, and above all who is not."""

import pytest
from engine_fakes import make_request

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Limits
from millrace.server.engine.scheduler import Scheduler
from millrace.server.engine.step_time import Work
from millrace.server.errors import DeadlineUnattainable
from millrace.server.types import Priority

SECOND = 1_000_000
EOS = frozenset({49})


def make_scheduler(base: int = 6_000, prompt: int = 100, decode: int = 200, **changes) -> Scheduler:
    """That has seen what steps cost, in microseconds."""
    limits = {
        "max_model_len": 16_384,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_queued_requests": 1000,
        "max_queued_tokens": 10**7,
        "max_step_us": 150_000,
    }
    scheduler = Scheduler(Limits(**{**limits, **changes}), BlockPool(4096, 32))
    for _ in range(10):
        for work in (Work(32, 0, 500), Work(0, 1, 50), Work(64, 4, 4_000), Work(0, 16, 4_000)):
            scheduler.observe(work, base + prompt * work.prompt_tokens + decode * work.decoding)
    return scheduler


def run(scheduler: Scheduler, now: int, until: int | None = None) -> int:
    """Serve until all is done, or so many sequences run; returns the time."""
    while scheduler.has_work and (until is None or scheduler.running < until):
        plan = scheduler.plan(now)
        assert not [finish.error for finish in scheduler.take_ended() if finish.error]
        assert plan is not None
        now += 10_000
        scheduler.commit(plan.step, plan.rows, [7] * len(plan.rows), {})
    return now


def test_what_takes_longer_than_it_has_is_refused():
    scheduler = make_scheduler()
    with pytest.raises(DeadlineUnattainable) as refused:
        scheduler.submit(make_request(1, [1], max_output_tokens=1000, deadline_us=SECOND), now_us=0)
    assert 6_000 < int(refused.value.metadata["estimate_ms"]) < 7_000
    assert refused.value.metadata["left_ms"] == "1000"
    scheduler.submit(make_request(1, [1], max_output_tokens=1000, deadline_us=8 * SECOND), now_us=0)
    scheduler.submit(make_request(2, [1], max_output_tokens=1000, deadline_us=SECOND, stop_token_ids=EOS), now_us=0)


@pytest.mark.parametrize("max_step_us", [None, 150_000])
def test_ordinary_timeouts_are_met_however_steps_are_bounded(max_step_us):
    scheduler = make_scheduler(max_step_us=max_step_us)
    for sequence_id in range(25):
        prompt = [sequence_id] * 10_000
        request = make_request(sequence_id, prompt, max_output_tokens=50, stop_token_ids=EOS, deadline_us=60 * SECOND)
        scheduler.submit(request, now_us=0)
    run(scheduler, 0)


def test_choices_that_wait_for_their_prompt_are_no_traffic():
    scheduler = make_scheduler()
    asked = {"max_output_tokens": 256, "deadline_us": 2_400_000}
    choices = [make_request(i, range(2000), choice=i, **asked) for i in range(8)]
    scheduler.submit(*choices, now_us=0)
    assert scheduler.plan(0).rows
    assert not scheduler.take_ended(), "the prompt takes 0.2 seconds, once; the tokens 1.6"


def test_what_the_prefix_cache_has_takes_no_time():
    scheduler = make_scheduler(prompt=5_000)
    history = [i * 7 % 40 for i in range(10_000)]
    scheduler.submit(make_request(1, history, max_output_tokens=1), now_us=0)
    now = run(scheduler, 0)
    turn = {"max_output_tokens": 5, "stop_token_ids": EOS, "deadline_us": 30 * SECOND}
    scheduler.submit(make_request(2, [*history, *range(40)], **turn), now_us=now)
    run(scheduler, now)
    with pytest.raises(DeadlineUnattainable):
        scheduler.submit(make_request(3, [1, *history], **turn), now_us=now)


def test_an_estimate_that_is_wrong_does_not_stay():
    scheduler = make_scheduler(base=600_000)
    asked = {"max_output_tokens": 100, "deadline_us": 5 * SECOND}
    tries = 0
    for tries in range(1, 60):
        try:
            scheduler.submit(make_request(tries, [1], **asked), now_us=tries * SECOND)
        except DeadlineUnattainable:
            continue
        break
    assert 10 < tries < 40, "an idle engine is asked again, and finds out"


def test_short_answers_are_not_reckoned_with_as_long_ones():
    scheduler = make_scheduler()
    scheduler._admission._mean_output, scheduler._admission.is_full = 400.0, True
    for sequence_id in range(200):
        request = make_request(sequence_id, range(50), max_output_tokens=1, stop_token_ids=EOS, deadline_us=10 * SECOND)
        scheduler.submit(request, now_us=0)


def test_a_time_limit_is_an_end_that_is_in_time():
    scheduler = make_scheduler()
    request = make_request(1, [1], max_output_tokens=4096, time_limit_us=5 * SECOND, deadline_us=10 * SECOND)
    scheduler.submit(request, now_us=0)


def test_what_goes_on_from_another_worker_is_not_refused():
    scheduler = make_scheduler()
    asked = {"output_ids": [2, 3], "max_output_tokens": 1000, "deadline_us": SECOND}
    with pytest.raises(DeadlineUnattainable):
        scheduler.submit(make_request(1, [1], **asked), now_us=0)
    scheduler.submit(make_request(1, [1], resumes=True, **asked), now_us=0)
    assert scheduler.plan(0).rows


def test_a_prompt_alone_is_not_cut_into_crumbs_where_steps_are_slow():
    scheduler = make_scheduler(base=200_000, prompt=2_000)
    scheduler.submit(make_request(1, [1] * 2000, max_output_tokens=1), now_us=0)
    steps = 0
    while scheduler.has_work:
        plan = scheduler.plan(0)
        scheduler.commit(plan.step, plan.rows, [7] * len(plan.rows), {})
        steps += 1
    assert steps < 30, "16 tokens at a time would be 125"


def test_who_would_be_late_is_told_before_it_costs_anything():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.submit(make_request(1, [1], max_output_tokens=2), now_us=0)
    plan = scheduler.plan(0)
    scheduler.submit(make_request(2, [2] * 3000, max_output_tokens=1, deadline_us=SECOND), now_us=0)
    scheduler.commit(plan.step, plan.rows, [7], {})
    plan = scheduler.plan(0)
    scheduler.commit(plan.step, plan.rows, [7], {})
    assert scheduler.plan(900_000) is None, "0.3 seconds of work do not fit into 0.1"
    (told,) = scheduler.take_ended()
    assert (told.sequence_id, type(told.error), told.started) == (2, DeadlineUnattainable, False)
    assert scheduler.tenants.enter("tenant", 1.0, 0).counter <= 5, "nothing was charged for it"


def test_nobody_starts_who_would_make_a_running_one_late():
    scheduler = make_scheduler(decode=5_000, max_step_us=None)
    scheduler.submit(make_request(1, [1], max_output_tokens=100, deadline_us=6_700_000), now_us=0)
    plan = scheduler.plan(0)
    scheduler.commit(plan.step, plan.rows, [7], {})
    scheduler.submit(make_request(2, [2], max_output_tokens=100), now_us=0)
    assert [row.sequence.request.sequence_id for row in scheduler.plan(0).rows] == [1]
    high = make_request(3, [3], max_output_tokens=100, priority=Priority.HIGH)
    scheduler = make_scheduler(decode=5_000, max_step_us=None)
    scheduler.submit(make_request(1, [1], max_output_tokens=100, deadline_us=6_700_000), now_us=0)
    plan = scheduler.plan(0)
    scheduler.commit(plan.step, plan.rows, [7], {})
    scheduler.submit(high, now_us=0)
    assert [row.sequence.request.sequence_id for row in scheduler.plan(0).rows] == [1, 3], "a higher class may"


def test_of_one_tenant_the_nearest_deadline_comes_first():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    for sequence_id, seconds in ((1, 50), (2, 20), (3, None), (4, 30), (5, 300)):
        deadline_us = None if seconds is None else seconds * SECOND
        scheduler.submit(make_request(sequence_id, [sequence_id] * 16, deadline_us=deadline_us), now_us=0)
    order = []
    while len(order) < 5:
        plan = scheduler.plan(0)
        order += [sequence.request.sequence_id for sequence in plan.admitted]
        scheduler.commit(plan.step, plan.rows, [7] * len(plan.rows), {})
    assert order == [2, 4, 1, 3, 5], "one without a deadline counts as if it had one of two minutes"

"""What the order of service gives whom, in virtual time."""

import random
from itertools import count
from statistics import mean

import pytest
from simulation_time import SECOND, STEP, Life, make, simulate

from millrace.server.types import Priority


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def waits(lives: dict[int, Life], tenant: str) -> list[int]:
    return [life.wait for life in lives.values() if life.request.tenant == tenant]


def flood(count: int, tenant: str = "a", prompt: int = 1500) -> list:
    return [(0, make(1000 + i, tenant, prompt, 64)) for i in range(count)]


def trickle(seconds: int) -> list:
    return [(i * SECOND + 123_456, make(i, "b", 40, 16)) for i in range(seconds)]


def test_a_tenant_that_floods_does_not_make_the_others_wait():
    alone = percentile(waits(simulate(trickle(60)), "b"), 0.99)
    beside = percentile(waits(simulate([*flood(50), *trickle(60)]), "b"), 0.99)
    assert beside <= alone + 2 * STEP


def test_in_order_of_arrival_they_would_wait():
    """The flood is one: without tenants the same traffic takes minutes to come to them."""
    same = [(at, make(r.sequence_id, "a", len(r.prompt_ids), r.max_output_tokens)) for at, r in trickle(60)]
    lives = simulate([*flood(50), *same])
    slow = percentile([life.wait for life in lives.values() if life.request.sequence_id < 1000], 0.99)
    assert slow > 100 * STEP


def test_a_lone_tenant_gets_everything():
    lives = simulate(flood(20))
    busy = max(life.ended for life in lives.values())
    prompts, outputs = 20 * 1500, 20 * 64
    assert busy < 1.35 * (prompts * 2_500 + outputs * 2_900), "hardly more than the work itself"


def test_a_tenant_is_bounded_where_the_operator_says_so():
    lives = simulate([(0, make(i, "a", 50, 100)) for i in range(20)], max_running_of_tenant=4)
    events = sorted([(life.first, 1) for life in lives.values()] + [(life.ended, -1) for life in lives.values()])
    running, most = 0, 0
    for _, change in events:
        running += change
        most = max(most, running)
    assert most == 4


@pytest.mark.parametrize(("weights", "expected"), [((1.0, 1.0), 1.0), ((2.0, 1.0), 2.0)])
def test_backlogged_tenants_are_served_by_their_weights(weights, expected):
    """Within the bound of the paper (theorem 4.4): the difference is at most what one request may hold, twice."""
    number = count(1)
    arrivals = [
        (0, make(next(number), name, prompt, 32, tenant_weight=weight))
        for name, weight, prompt in (("a", weights[0], 900), ("b", weights[1], 90))
        for _ in range(100 if name == "a" else 400)
    ]
    served = {"a": 0, "b": 0}
    for life in simulate(arrivals, until=100 * SECOND, max_queued_requests=2000).values():
        prompt = len(life.request.prompt_ids) if life.first else 0
        served[life.request.tenant] += prompt + 2 * life.tokens
    bound = 2 * max(900, 2 * 64 * 32)
    assert abs(served["a"] / weights[0] - served["b"] / weights[1]) <= bound
    assert served["a"] / served["b"] == pytest.approx(expected, rel=0.15)


def test_an_idle_tenant_earns_no_credit():
    """One that comes later starts level with those that are there, and shares from then on."""
    arrivals = [*flood(40, prompt=300), *((30 * SECOND, make(i, "b", 300, 64)) for i in range(40))]
    lives = simulate(arrivals, until=50 * SECOND)
    since = {"a": 0, "b": 0}
    for life in lives.values():
        if life.first and life.first > 30 * SECOND:
            since[life.request.tenant] += 1
    assert since["b"] <= since["a"] + 12


def test_classes_come_before_tenants_and_age():
    arrivals = [(0, make(i, "a", 300, 16, priority=Priority.NORMAL)) for i in range(200)]
    arrivals += [(SECOND, make(1000, "b", 300, 16, priority=Priority.HIGH))]
    arrivals += [(SECOND, make(2000, "c", 300, 16, priority=Priority.LOW))]
    lives = simulate(arrivals, max_num_seqs=4, ageing_us=20 * SECOND)
    assert lives[1000].wait < 3 * SECOND
    later = sum(life.first > lives[2000].first for life in lives.values())
    assert lives[2000].wait >= 20 * SECOND
    assert later > 20, "it did not wait for all of a higher class"


def traffic(rate: float, seconds: int, seed: int) -> list:
    """Requests of which about 1.3 a second can be served, with deadlines of 8 to 20 seconds."""
    r = random.Random(seed)
    arrivals, at = [], 0.0
    for number in count(1):
        at += r.expovariate(rate)
        if at > seconds:
            return arrivals
        prompt, output = r.randint(50, 400), r.randint(20, 120)
        arrivals.append(
            (
                round(at * SECOND),
                make(number, r.choice("abc"), prompt, output, deadline_us=round(r.uniform(8, 20) * SECOND)),
            )
        )
    raise AssertionError


def goodput(lives: dict[int, Life]) -> float:
    return sum(life.in_time for life in lives.values())


CAPACITY = 1.3


def test_overload_with_deadlines_serves_more_in_time_than_order_of_arrival():
    gains = []
    for seed in range(3):
        arrivals = traffic(3 * CAPACITY, 120, seed)
        ours = goodput(simulate(arrivals))
        first_come = [
            (at, make(r.sequence_id, "a", len(r.prompt_ids), r.max_output_tokens, deadline_us=r.deadline_us))
            for at, r in arrivals
        ]
        gains.append(ours / goodput(simulate(first_come, deadlines=False)))
    assert mean(gains) >= 1.3


def test_goodput_stays_flat_however_much_arrives():
    peak = max(goodput(simulate(traffic(load * CAPACITY, 120, 1))) for load in (0.8, 1, 1.5, 2, 3))
    refused = late = 0
    for seed in range(1, 4):
        lives = simulate(traffic(10 * CAPACITY, 120, seed))
        assert goodput(lives) >= 0.9 * peak
        turned_away = [life for life in lives.values() if life.error == "DEADLINE_UNATTAINABLE"]
        assert all(life.tokens == 0 for life in turned_away)
        refused, late = refused + len(turned_away), late + sum(not life.refused for life in turned_away)
    assert late <= 0.01 * refused, "all others are told at once"

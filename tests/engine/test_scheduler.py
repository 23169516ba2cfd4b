import ast
from pathlib import Path

import pytest
from engine_fakes import make_request

from millrace.server.engine import scheduler as module
from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Limits
from millrace.server.engine.scheduler import Scheduler
from millrace.server.errors import ExceedsKVCapacity, PromptTooLong, QueueFull
from millrace.server.types import Priority


def make_scheduler(blocks=100, block_size=4, **changes):
    limits = {
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_queued_requests": 10,
        "max_queued_tokens": 100,
    }
    return Scheduler(Limits(**{**limits, **changes}), BlockPool(blocks, block_size))


def spans(plan):
    return [(row.sequence.request.sequence_id, row.start, row.end, row.samples) for row in plan.rows]


def commit(scheduler, plan, token=7):
    result = scheduler.commit(plan.step, plan.rows, [token] * len(plan.rows), {})
    scheduler.check()
    return result


def test_the_scheduler_is_plain_python():
    pure = ["scheduler", "plan", "prefixes", "blocks", "sequence", "queue", "tenants", "heap", "running", "sharing"]
    for name in [*pure, "deadlines", "admission", "budget", "preemption", "step_time"]:
        tree = ast.parse((Path(module.__file__).parent / f"{name}.py").read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"torch", "numpy", "asyncio", "threading", "time", "random"}


def test_decodes_come_first_then_chunks_in_order_of_arrival():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.submit(make_request(1, range(3)), now_us=0)
    scheduler.submit(make_request(2, range(10)), now_us=0)
    scheduler.submit(make_request(3, range(2)), now_us=0)
    plans = []
    for _ in range(4):
        plans.append(scheduler.plan(0))
        commit(scheduler, plans[-1])
    assert spans(plans[0]) == [(1, 0, 3, True), (2, 0, 5, False)]
    assert spans(plans[1]) == [(1, 3, 4, True), (2, 5, 10, True), (3, 0, 2, True)]
    assert spans(plans[2]) == [(1, 4, 5, True), (2, 10, 11, True), (3, 2, 3, True)]
    assert (plans[1].decode_tokens, plans[1].prefill_tokens) == (1, 7)


def test_with_two_steps_in_flight_a_row_names_the_row_it_waits_for():
    scheduler = make_scheduler()
    scheduler.submit(make_request(1, range(3), max_output_tokens=3), now_us=0)
    scheduler.submit(make_request(2, range(3), max_output_tokens=2), now_us=0)
    first, second, third = scheduler.plan(0), scheduler.plan(0), scheduler.plan(0)
    assert [row.source for row in first.rows] == [None, None]
    assert [row.source for row in second.rows] == [(1, 0), (1, 1)]
    assert spans(third) == [(1, 4, 5, True)], "the last token of 2 is on its way: nothing is planned beyond it"
    assert scheduler.plan(0) is None


def test_an_end_in_flight_drops_the_later_row_and_frees_the_blocks_with_it():
    scheduler = make_scheduler()
    scheduler.submit(make_request(1, range(3), stop_token_ids=frozenset({7})), now_us=0)
    first, second, third = scheduler.plan(0), scheduler.plan(0), scheduler.plan(0)
    accepted, finished = commit(scheduler, first)
    assert (accepted, finished[0].stop_token_id) == ([0], 7)
    assert commit(scheduler, second) == ([], [])
    assert scheduler.pool.free < scheduler.pool.total
    assert commit(scheduler, third) == ([], [])
    assert scheduler.pool.free == scheduler.pool.total


def test_the_latest_arrival_gives_way_and_starts_over():
    scheduler = make_scheduler(blocks=5, block_size=2, max_model_len=10, prefix_caching=False)
    for sequence_id in (1, 2):
        scheduler.submit(make_request(sequence_id, range(3), max_output_tokens=6), now_us=0)
    order = []
    while scheduler.has_work:
        plan = scheduler.plan(0)
        order += [finish.sequence_id for finish in commit(scheduler, plan)[1]]
    assert scheduler.preemptions == 1
    assert order == [1, 2]


def test_blocks_on_their_way_back_are_waited_for_rather_than_taken_from_one_more():
    scheduler = make_scheduler(blocks=6, block_size=2, max_model_len=12)
    for sequence_id in (1, 2, 3):
        scheduler.submit(make_request(sequence_id, range(2), max_output_tokens=9), now_us=0)
    commit(scheduler, scheduler.plan(0))
    plans = [scheduler.plan(0) for _ in range(3)]
    assert [plan and len(plan.rows) for plan in plans] == [3, 3, None], "no block is free before a step comes back"
    assert scheduler.preemptions == 1
    for plan in plans[:2]:
        commit(scheduler, plan)
    assert [row.sequence.request.sequence_id for row in scheduler.plan(0).rows] == [1, 2]


def test_a_prompt_that_gives_way_half_read_is_read_again_from_its_start():
    scheduler = make_scheduler(blocks=12, block_size=1, max_num_batched_tokens=2, prefix_caching=False)
    scheduler.submit(make_request(1, range(2), max_output_tokens=8), now_us=0)
    scheduler.submit(make_request(2, range(8), max_output_tokens=2), now_us=0)
    planned = []
    while scheduler.has_work:
        plan = scheduler.plan(0)
        planned.append(spans(plan))
        commit(scheduler, plan)
    assert planned[1:4] == [[(1, 2, 3, True), (2, 0, 1, False)], [(1, 3, 4, True), (2, 1, 2, False)], [(1, 4, 5, True)]]
    assert next(span for spans in planned[4:] for span in spans if span[0] == 2) == (2, 0, 2, False)


def test_a_sequence_that_gave_way_finds_its_own_blocks_again():
    scheduler = make_scheduler(blocks=12, block_size=1, max_num_batched_tokens=2)
    scheduler.submit(make_request(1, range(2), max_output_tokens=8), now_us=0)
    scheduler.submit(make_request(2, range(10, 18), max_output_tokens=2), now_us=0)
    planned = []
    while scheduler.has_work:
        plan = scheduler.plan(0)
        planned.append(spans(plan))
        commit(scheduler, plan)
    assert scheduler.preemptions == 1
    mine = [span for spans in planned for span in spans if span[0] == 2]
    assert mine[:3] == [(2, 0, 1, False), (2, 1, 2, False), (2, 2, 4, False)], "nothing is read twice"


def test_a_full_pool_is_not_searched_at_every_step(monkeypatch):
    scheduler = make_scheduler(blocks=6, block_size=4, max_num_seqs=4)
    scheduler.submit(make_request(1, range(20), max_output_tokens=4), now_us=0)
    for _ in range(2):
        commit(scheduler, scheduler.plan(0))
    scheduler.submit(make_request(2, range(20), max_output_tokens=4), now_us=0)
    searches = []
    find = scheduler.pool.prefixes.find
    monkeypatch.setattr(scheduler.pool.prefixes, "find", lambda *words: searches.append(1) or find(*words))
    while scheduler.running:
        assert not searches
        commit(scheduler, scheduler.plan(0))
    commit(scheduler, scheduler.plan(0))
    assert len(searches) == 1


def test_the_oldest_always_finishes_whatever_arrives_behind_it():
    scheduler = make_scheduler(blocks=8, block_size=1, max_model_len=9, max_queued_requests=500, max_queued_tokens=5000)
    scheduler.submit(make_request(0, [1], max_output_tokens=8), now_us=0)
    finished = []
    for arrival in range(1, 400):
        scheduler.submit(make_request(arrival, [1] * (arrival % 3 + 1), max_output_tokens=5), now_us=0)
        plan = scheduler.plan(0)
        finished += [finish.sequence_id for finish in commit(scheduler, plan)[1]]
    assert finished[0] == 0
    assert len(finished) > 50
    assert sorted(finished) == list(range(len(finished))), "a later arrival overtook for good"


def test_the_queue_is_bounded_in_requests_and_in_tokens():
    scheduler = make_scheduler(max_queued_requests=3, max_queued_tokens=10)
    scheduler.submit(make_request(1, range(20)), now_us=0)  # alone it may wait, though it exceeds the bound
    with pytest.raises(QueueFull) as caught:
        scheduler.submit(make_request(2, range(1)), now_us=0)
    assert caught.value.retry_after > 0
    assert caught.value.metadata == {"waiting_sequences": "1", "waiting_tokens": "20"}
    scheduler.cancel(1)
    for sequence_id in (3, 4, 5):
        scheduler.submit(make_request(sequence_id, range(2)), now_us=0)
    with pytest.raises(QueueFull):
        scheduler.submit(make_request(6, range(2)), now_us=0)
    scheduler.check()
    assert (scheduler.waiting, scheduler.waiting_tokens) == (3, 6)


def test_the_choices_of_a_request_do_not_count_against_each_other():
    scheduler = make_scheduler(max_queued_requests=4, max_queued_tokens=10)
    scheduler.submit(*(make_request(i, range(2)) for i in range(8)), now_us=0)  # alone it may wait
    scheduler.cancel(7)
    for i in range(5):
        scheduler.cancel(i)
    assert (scheduler.waiting, scheduler.waiting_tokens) == (2, 4)
    with pytest.raises(QueueFull):
        scheduler.submit(*(make_request(i, range(2)) for i in range(10, 13)), now_us=0)
    assert scheduler.waiting == 2, "all or none"
    scheduler.submit(*(make_request(i, range(2)) for i in range(10, 12)), now_us=0)
    scheduler.check()


def test_what_can_never_run_is_rejected():
    scheduler = make_scheduler(blocks=4, block_size=4, max_model_len=20)
    with pytest.raises(PromptTooLong) as too_long:
        scheduler.submit(make_request(1, range(20)), now_us=0)
    assert too_long.value.metadata == {"prompt_tokens": "20", "limit": "19"}
    with pytest.raises(ExceedsKVCapacity) as too_large:
        scheduler.submit(make_request(1, range(10), max_output_tokens=8), now_us=0)
    assert too_large.value.metadata == {"blocks_needed": "5", "blocks_total": "4"}
    scheduler.submit(make_request(1, range(10), max_output_tokens=7), now_us=0)  # the last token needs no KV
    with pytest.raises(ValueError, match="live already"):
        scheduler.submit(make_request(1), now_us=0)


def test_a_cancel_frees_blocks_before_the_next_step():
    scheduler = make_scheduler()
    scheduler.submit(make_request(1, range(5)), now_us=0)
    scheduler.submit(make_request(2, range(50)), now_us=0)
    commit(scheduler, scheduler.plan(0))
    scheduler.cancel(2)
    scheduler.cancel(99)
    scheduler.check()
    assert scheduler.pool.total - scheduler.pool.free == 2
    assert spans(scheduler.plan(0)) == [(1, 5, 6, True)]


def test_every_running_sequence_can_decode_in_every_step():
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=3)
    for sequence_id in range(5):
        scheduler.submit(make_request(sequence_id, [1]), now_us=0)
    commit(scheduler, scheduler.plan(0))
    assert (scheduler.running, scheduler.waiting) == (3, 2)
    assert len(scheduler.plan(0).rows) == 3


def test_queue_time_ends_with_the_first_row():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.submit(make_request(1, [1], max_output_tokens=1), now_us=100)
    scheduler.submit(make_request(2, [1], max_output_tokens=1), now_us=100)
    assert commit(scheduler, scheduler.plan(150))[1][0].queue_us == 50
    assert commit(scheduler, scheduler.plan(170))[1][0].queue_us == 70


def test_a_tenant_with_more_than_its_share_gives_way_to_one_with_less():
    scheduler = make_scheduler(blocks=12, block_size=4, max_num_batched_tokens=64, prefix_caching=False)
    for sequence_id in (1, 2, 3):
        scheduler.submit(make_request(sequence_id, range(8), tenant="a", max_output_tokens=8), now_us=0)
    for _ in range(3):
        commit(scheduler, scheduler.plan(0))
    assert scheduler.pool.free < 4
    scheduler.submit(make_request(4, range(8), tenant="b", max_output_tokens=8), now_us=0)
    plan = scheduler.plan(0)
    assert [s.request.sequence_id for s in plan.admitted] == [4]
    assert scheduler.preemptions == 1
    assert [row.sequence.request.sequence_id for row in plan.rows] == [1, 2, 4]
    commit(scheduler, plan)
    ended = []
    while scheduler.has_work:
        ended += [finish.sequence_id for finish in commit(scheduler, scheduler.plan(0))[1]]
    assert sorted(ended) == [1, 2, 3, 4]
    assert scheduler.preemptions <= 3, "nobody takes turns at giving way"


def test_a_tenant_within_its_share_gives_way_to_nobody():
    scheduler = make_scheduler(blocks=12, block_size=4, max_num_batched_tokens=64, prefix_caching=False)
    scheduler.submit(make_request(1, range(23), tenant="a", max_output_tokens=1), now_us=0)
    scheduler.plan(0)
    scheduler.submit(make_request(2, range(22), tenant="b", max_output_tokens=1), now_us=0)
    assert scheduler.plan(0) is None, "half of the blocks are its share, and a block more would be needed for both"
    assert scheduler.preemptions == 0


def test_one_that_gave_way_twice_gives_way_to_no_arrival():
    scheduler = make_scheduler(blocks=6, block_size=4, max_num_batched_tokens=64, prefix_caching=False)
    scheduler.submit(make_request(1, range(16), priority=Priority.LOW, max_output_tokens=8), now_us=0)
    commit(scheduler, scheduler.plan(0))
    for arrival in (2, 3, 4):
        scheduler.submit(make_request(arrival, range(16), priority=Priority.HIGH, max_output_tokens=1), now_us=0)
        while scheduler.running + scheduler.waiting == 2:
            commit(scheduler, scheduler.plan(0))
        commit(scheduler, scheduler.plan(0))
    assert scheduler.preemptions == 2

"""Bugs of the kind that schedulers have had, each planted in a world that must notice it.

Many are of real servers. One the simulation found in this one: `a_cancelled_one_that_was_turned_away_has_a_last_word`.
"""

from collections.abc import Callable
from typing import Any

from simulation_world import World

from millrace.server.engine.prefixes import Chain
from millrace.server.engine.sequence import Sequence, Status
from millrace.server.engine.tenants import Tenant

Bug = Callable[[World], None]


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of an object by `wrapper(method, *arguments)`."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: wrapper(method, *arguments, **named))


def leak_on_abort_while_reading_the_prompt(world: World) -> None:
    def release(method: Any, sequence: Sequence) -> None:
        if sequence.status is Status.FINISHED and sequence.computed < sequence.prompt_len:
            sequence.blocks = []
        else:
            method(sequence)

    around(world.scheduler._running, "_release", release)


def double_free_when_one_of_several_choices_ends(world: World) -> None:
    def release(method: Any, sequence: Sequence) -> None:
        if len(sequence.group.members) > 1:
            world.pool.release(sequence.blocks[:1])
        method(sequence)

    around(world.scheduler._running, "_release", release)


def a_completion_counts_twice(world: World) -> None:
    around(world.scheduler, "_arrive", lambda method, step, rows: None)


def a_shared_block_is_not_counted(world: World) -> None:
    around(
        world.pool,
        "share",
        lambda method, blocks: method([block for block in blocks if world.pool._owners[block] == 0]),
    )


def preemption_loses_the_last_token(world: World) -> None:
    def preempt(method: Any, plan: Any, sequence: Sequence) -> None:
        method(plan, sequence)
        if sequence.output:
            sequence.output.pop()
            sequence.length -= 1

    around(world.scheduler, "_preempt", preempt)


def one_block_too_few_at_a_boundary(world: World) -> None:
    around(world.pool, "blocks_for", lambda method, tokens: method(tokens - 1) if tokens > 1 else 1)


def a_stop_is_missed_while_the_next_token_is_on_its_way(world: World) -> None:
    def commit(method: Any, step: int, rows: Any, tokens: Any, errors: Any) -> Any:
        missed = {row.sequence.request: row.sequence.request.stop_token_ids for row in rows if row.sequence.pending > 1}
        for request in missed:
            object.__setattr__(request, "stop_token_ids", frozenset())  # it is frozen
        try:
            return method(step, rows, tokens, errors)
        finally:
            for request, stops in missed.items():
                object.__setattr__(request, "stop_token_ids", stops)

    around(world.scheduler, "commit", commit)


def a_cancelled_one_that_was_turned_away_has_a_last_word(world: World) -> None:
    def cancel(method: Any, sequence_id: int) -> None:
        ended = list(world.scheduler._ended)
        method(sequence_id)
        world.scheduler._ended = ended

    around(world.scheduler, "cancel", cancel)


def a_block_in_use_is_evicted(world: World) -> None:
    def share(method: Any, blocks: Any) -> None:
        kept = [block for block in blocks if block in world.pool._evictable]
        method(blocks)
        for block in kept:
            world.pool._evictable[block] = None

    around(world.pool, "share", share)


def the_least_class_comes_first(world: World) -> None:
    queue = world.scheduler._queue

    def first(method: Any) -> Any:
        queue._buckets.reverse(), queue._tenants.reverse()
        try:
            return method()
        finally:
            queue._buckets.reverse(), queue._tenants.reverse()

    around(queue, "first", first)


def service_is_not_charged(world: World) -> None:
    around(world.scheduler.tenants, "enter", lambda method, *words: with_no_service(method(*words)))


class Unserved(Tenant):
    def charge(self, prompt_tokens: int, output_tokens: int) -> None:
        pass


def with_no_service(tenant: Tenant) -> Tenant:
    tenant.__class__ = Unserved
    return tenant


def recomputed_tokens_are_charged(world: World) -> None:
    def preempt(method: Any, plan: Any, sequence: Sequence) -> None:
        method(plan, sequence)
        sequence.charged = 0

    around(world.scheduler, "_preempt", preempt)


def the_salt_is_left_out(world: World) -> None:
    around(
        world.scheduler,
        "_sequence",
        lambda method, *words: with_chain(method(*words), lambda s: Chain(s.request.tenant, world.pool.block_size)),
    )


def the_tenant_is_left_out(world: World) -> None:
    around(
        world.scheduler,
        "_sequence",
        lambda method, *words: with_chain(
            method(*words), lambda s: Chain("", world.pool.block_size, s.request.cache.salt)
        ),
    )


def with_chain(sequence: Sequence, make: Callable[[Sequence], Chain]) -> Sequence:
    if sequence.chain is not None:
        sequence.chain = make(sequence)
    return sequence


def deadlines_are_ignored_in_the_queue(world: World) -> None:
    def note(method: Any, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            method(sequence)

    around(world.scheduler._deadlines, "note", note)


def a_choice_reads_a_block_that_was_not_copied(world: World) -> None:
    def begin(method: Any, sequence: Sequence, shared: int, serial: Any, plan: Any) -> None:
        method(sequence, shared, serial, plan)
        plan.copies.clear()

    around(world.scheduler._sharing, "begin", begin)


def blocks_are_found_before_they_are_computed(world: World) -> None:
    around(
        world.scheduler,
        "_plan_chunk",
        lambda method, plan, sequence, budget: (
            method(plan, sequence, budget),
            world.scheduler._sharing.publish(sequence, sequence.scheduled),
        ),
    )


def a_lost_step_keeps_its_samples(world: World) -> None:
    def rollback(method: Any, step: int, rows: Any) -> None:
        rows = list(rows)
        method(step, rows)
        for row in rows:
            if row.samples:
                row.sequence.pending += 1
                row.sequence.length += 1

    around(world.scheduler, "rollback", rollback)


def a_victim_keeps_its_lane(world: World) -> None:
    def stop_running(method: Any, sequence: Sequence) -> None:
        lane = sequence.lane
        method(sequence)
        if sequence.preemptions == 1:
            world.scheduler._running._lanes.remove(lane)

    around(world.scheduler._running, "stop", stop_running)


def a_preempted_one_starves(world: World) -> None:
    queue = world.scheduler._queue

    def put(method: Any, sequence: Sequence, held: bool = False) -> None:
        method(sequence, held=held or sequence.preemptions > 1)

    around(queue, "put", put)


BUGS: tuple[Bug, ...] = (
    leak_on_abort_while_reading_the_prompt,
    double_free_when_one_of_several_choices_ends,
    a_completion_counts_twice,
    a_shared_block_is_not_counted,
    preemption_loses_the_last_token,
    one_block_too_few_at_a_boundary,
    a_stop_is_missed_while_the_next_token_is_on_its_way,
    a_cancelled_one_that_was_turned_away_has_a_last_word,
    a_block_in_use_is_evicted,
    the_least_class_comes_first,
    service_is_not_charged,
    recomputed_tokens_are_charged,
    the_salt_is_left_out,
    the_tenant_is_left_out,
    deadlines_are_ignored_in_the_queue,
    a_choice_reads_a_block_that_was_not_copied,
    blocks_are_found_before_they_are_computed,
    a_lost_step_keeps_its_samples,
    a_victim_keeps_its_lane,
    a_preempted_one_starves,
)

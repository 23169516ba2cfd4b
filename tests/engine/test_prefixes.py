"""Blocks that are found again by what is in them: by their own tenant, after the same tokens, and never by others."""

import hashlib
from types import SimpleNamespace

import pytest
from engine_fakes import drain, make_engine, make_request
from engine_workload import Workload

from millrace.server.engine import prefixes
from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.prefixes import Chain, Prefixes


def chain(tokens, tenant="a", size=2):
    made = Chain(tenant, size)
    made.extend(tokens)
    return made


def known(tokens, tenant="a"):
    """A registry that has the blocks 7, 8, ... of a text."""
    found, before = Prefixes(), 0
    for index in range(len(tokens) // 2):
        before = found.add(chain(tokens, tenant), index, before, 7 + index)
    return found


def blocks(found):
    return [prefix.block for prefix in found]


def test_the_longest_known_beginning_is_found():
    found = known([1, 2, 3, 4, 5, 6])
    assert blocks(found.find(chain([1, 2, 3, 4, 5, 6]), 3)) == [7, 8, 9]
    assert blocks(found.find(chain([1, 2, 3, 4, 5, 6]), 2)) == [7, 8]
    assert blocks(found.find(chain([1, 2, 3, 4, 0, 6]), 3)) == [7, 8]
    assert blocks(found.find(chain([0, 2, 3, 4, 5, 6]), 3)) == []
    assert blocks(found.find(chain([3, 4]), 3)) == [], "the same tokens at another place are another block"


def test_tenants_find_nothing_of_each_other():
    found = known([1, 2, 3, 4], "a")
    assert found.find(chain([1, 2, 3, 4], "b"), 2) == []
    assert found.find(chain([1, 2, 3, 4], ""), 2) == []


def test_a_text_that_is_known_stays_where_it_is():
    found = known([1, 2, 3, 4])
    serial = found.add(chain([1, 2]), 0, 0, 99)
    assert serial == found.find(chain([1, 2]), 1)[0].serial
    assert 99 not in found
    assert len(found) == 2


def test_what_follows_a_forgotten_block_is_not_found_and_makes_way():
    pool = BlockPool(9, 2)
    owned = pool.allocate(4)
    text = chain([1, 2, 3, 4])
    first = pool.publish(text, 0, 0, owned[0])
    pool.publish(text, 1, first, owned[1])
    pool.prefixes.forget(owned[0])
    assert pool.prefixes.find(text, 2) == []
    again = pool.publish(text, 0, 0, owned[2])
    assert again not in (None, first)
    assert pool.publish(text, 1, again, owned[3]) is not None
    assert blocks(pool.prefixes.find(text, 2)) == [owned[2], owned[3]]
    pool.check([owned])


def weak(data):
    """A hash of four bits: nearly every text collides."""
    return SimpleNamespace(digest=lambda: bytes([hashlib.sha256(data).digest()[0] & 15]))


def test_a_collision_is_not_a_hit(monkeypatch):
    monkeypatch.setattr(prefixes, "sha256", weak)
    found = Prefixes()
    texts = [[i, i + 1] for i in range(40)]
    taken = {chain(text)[0][0]: text for text in reversed(texts)}
    for block, text in enumerate(texts):
        serial = found.add(chain(text), 0, 0, block)
        assert (serial is not None) == (taken[chain(text)[0][0]] == text)
    for text in texts:
        assert blocks(found.find(chain(text), 1)) in ([], [texts.index(text)])


@pytest.mark.parametrize("seed", range(40))
def test_traffic_with_a_hash_that_collides(monkeypatch, seed):
    monkeypatch.setattr(prefixes, "sha256", weak)
    Workload(seed, steps_in_flight=1 + seed % 2, shared=True).run()


def test_a_conversation_computes_what_is_new_and_at_most_a_block_more():
    engine, executor, _ = make_engine(blocks=200, block_size=4, max_model_len=400, max_num_batched_tokens=64)
    history: list[int] = []
    for turn in range(10):
        prompt = [*history, *(turn * 7 + i for i in range(1, 12))]
        fresh = len(prompt) - len(history)
        before = len(executor.batches)
        engine.submit(make_request(turn, [token % 50 for token in prompt], max_output_tokens=9))
        tokens, finished = drain(engine)
        computed = sum(len(batch.token_ids) for batch in executor.batches[before:]) - (len(tokens[turn]) - 1)
        assert computed <= fresh + 4
        assert finished[turn].cached_prompt_tokens == len(prompt) - computed
        history = [*prompt, *tokens[turn]]


def test_without_the_cache_nothing_is_found():
    engine, _, _ = make_engine(prefix_caching=False)
    for turn in range(2):
        engine.submit(make_request(turn, range(20)))
        assert drain(engine)[1][turn].cached_prompt_tokens == 0


def test_another_tenants_prompt_is_computed_anew():
    engine, _, _ = make_engine()
    for turn, tenant in enumerate(["a", "b", "a"]):
        request = make_request(turn, range(20), tenant=tenant)
        engine.submit(request)
        assert drain(engine)[1][turn].cached_prompt_tokens == [0, 0, 16][turn]


def test_the_least_recently_used_gives_way_and_a_beginning_last():
    engine, _, _ = make_engine(blocks=8, block_size=2, max_model_len=16)

    def ask(number, tokens):
        engine.submit(make_request(number, tokens, max_output_tokens=1))
        return drain(engine)[1][number].cached_prompt_tokens

    old, new = [1, 1, 2, 2, 3, 3, 4], [5, 5, 6, 6, 7, 7, 8]
    assert [ask(0, old), ask(1, new)] == [0, 0]
    assert ask(2, [9] * 7) == 0  # takes two unused blocks and the two of `old` that are longest unwanted
    assert ask(3, new) == 6
    assert ask(4, old) == 2


def test_what_several_computed_at_once_is_known_while_one_of_them_holds_it():
    engine, _, _ = make_engine(blocks=24, block_size=4, max_model_len=48, max_num_batched_tokens=64)
    prompt = list(range(17))
    engine.submit(make_request(1, prompt, max_output_tokens=1))
    engine.submit(make_request(2, prompt, max_output_tokens=30))
    engine.step()
    for number in range(3, 9):  # these take the place of what 1 left
        engine.submit(make_request(number, [20 + number] * 17, max_output_tokens=1))
        engine.step()
    engine.submit(make_request(9, prompt, max_output_tokens=1))
    _, finished = drain(engine)
    assert finished[9].cached_prompt_tokens == 16
    assert finished[2].preemptions == 0, "it holds the prompt all the while"


def test_copies_take_over_and_are_let_go():
    pool = BlockPool(9, 2)
    text = chain([1, 2])
    first, second, third = ([block] for block in pool.allocate(3))
    serials = {pool.publish(text, 0, 0, blocks[0]) for blocks in (first, second, third)}
    assert len(serials) == 1
    pool.release(second)
    assert pool.evictable == 0
    pool.release(first)
    assert (pool.evictable, blocks(pool.prefixes.find(text, 1))) == (0, third)
    pool.release(third)
    assert (pool.evictable, blocks(pool.prefixes.find(text, 1))) == (1, third)
    pool.check([])

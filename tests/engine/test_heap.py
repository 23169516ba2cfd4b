import random

import pytest

from millrace.server.engine.heap import Heap


@pytest.mark.parametrize("seed", range(30))
def test_the_first_is_that_of_a_plain_search(seed):
    r, heap, plain = random.Random(seed), Heap(), {}
    for number in range(400):
        item = r.randrange(30)
        if r.random() < 0.6:
            key = (r.randrange(8),)
            if plain.get(item, (None,))[0] != key:
                plain[item] = key, number
            heap.put(item, key)
        else:
            plain.pop(item, None)
            heap.remove(item)
        assert set(heap) == set(plain)
        assert len(heap) == len(plain)
        assert heap.first() == min(plain, key=plain.__getitem__, default=None), "of equal keys, the one put first"
        assert all(heap.key(item) == plain[item][0] for item in plain)
    assert len(heap._entries) <= 2 * len(plain) + 33


def test_what_comes_and_goes_beneath_the_first_takes_no_memory():
    heap = Heap()
    heap.put("first", (0,))
    for number in range(10_000):
        heap.put(number, (1,))
        heap.remove(number)
    assert heap.first() == "first"
    assert len(heap._entries) < 100


def test_what_is_taken_out_takes_no_memory():
    heap = Heap()
    for number in range(10_000):
        heap.put(number, (number,))
    for number in range(1, 10_000):
        heap.remove(number)
    assert heap.first() == 0
    assert len(heap._entries) < 100

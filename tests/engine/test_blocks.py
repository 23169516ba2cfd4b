import random

import pytest

from millrace.server.engine.blocks import BlockPool


def test_the_identity_holds_after_every_operation():
    for seed in range(50):
        r = random.Random(seed)
        pool, holders = BlockPool(r.randint(1, 20), block_size=4), []
        for _ in range(100):
            if r.random() < 0.5 and pool.free:
                holders.append(pool.allocate(r.randint(0, pool.free)))
            elif holders:
                pool.release(holders.pop(r.randrange(len(holders))))
            pool.check(holders)
            assert pool.free + len({b for blocks in holders for b in blocks}) == pool.total
        for blocks in holders:
            pool.release(blocks)
        assert pool.free == pool.total


def test_misuse_changes_nothing():
    pool = BlockPool(3, block_size=4)
    held = pool.allocate(2)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        pool.allocate(2)
    with pytest.raises(ValueError, match="released twice"):
        pool.release([2])
    pool.check([held])
    with pytest.raises(ValueError, match="a pool needs blocks"):
        BlockPool(0, block_size=4)


@pytest.mark.parametrize("holders", [[], [[0]], [[0, 1], [1]], [[0, 1, 2]]])
def test_the_check_finds_leaks_and_doubles(holders):
    pool = BlockPool(3, block_size=4)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(AssertionError):
        pool.check(holders)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_tokens(tokens, blocks):
    assert BlockPool(9, block_size=4).blocks_for(tokens) == blocks

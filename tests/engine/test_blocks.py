import random

import pytest

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.prefixes import Chain


def test_the_identity_holds_after_every_operation():
    for seed in range(50):
        r = random.Random(seed)
        pool, holders = BlockPool(r.randint(1, 20), block_size=1), []
        for _ in range(200):
            if r.random() < 0.5:
                text = [r.randrange(3) for _ in range(r.randint(1, 4))]
                hold(pool, holders, text)
            elif holders:
                pool.release(holders.pop(r.randrange(len(holders))))
            pool.check(holders)
            assert pool.free + len({b for blocks in holders for b in blocks}) == pool.total
        for blocks in holders:
            pool.release(blocks)
        assert pool.free == pool.total
        assert pool.evictable == len(pool.prefixes)


def hold(pool, holders, text):
    """As a scheduler does: what is known is shared, the rest allocated and made known."""
    chain = Chain("tenant", 1)
    chain.extend(text)
    found = pool.prefixes.find(chain, len(text))
    shared = [prefix.block for prefix in found]
    if pool.unowned(shared) + len(text) - len(shared) > pool.free:
        return
    pool.share(shared)
    blocks = shared + pool.allocate(len(text) - len(shared))
    serial = found[-1].serial if found else 0
    for index in range(len(shared), len(text)):
        serial = pool.publish(chain, index, serial, blocks[index])
    holders.append(blocks)


def test_misuse_changes_nothing():
    pool = BlockPool(3, block_size=4)
    held = pool.allocate(2)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        pool.allocate(2)
    with pytest.raises(ValueError, match="released twice"):
        pool.release([2])
    with pytest.raises(ValueError, match="holds nothing to share"):
        pool.share([2])
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

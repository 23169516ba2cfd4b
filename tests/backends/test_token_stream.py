"""The mailbox of a request, filled by hand."""

import pytest

from millrace.server.backends.token_stream import MergedStream
from millrace.server.errors import EngineLost, EngineRestarting


async def test_a_lost_stream_counts_what_waits_to_be_taken() -> None:
    stream = MergedStream(range(1), lambda choices: None)
    stream.admit()
    stream.push(0, 5)
    assert [delta.token_ids for delta in await anext(stream)] == [[5]]
    stream.push(0, 6)
    stream.push(0, 7)
    stream.lose("gone")
    assert [delta.token_ids for delta in await anext(stream)] == [[6, 7]]
    with pytest.raises(EngineLost) as raised:
        await anext(stream)
    assert raised.value.metadata == {"tokens_delivered": "3"}


async def test_a_stream_lost_before_its_first_token_was_taken_can_be_retried() -> None:
    stream = MergedStream(range(1), lambda choices: None)
    stream.admit()
    stream.push(0, 5)
    stream.lose("gone")
    with pytest.raises(EngineRestarting):
        await anext(stream)
    assert [deltas async for deltas in stream] == []

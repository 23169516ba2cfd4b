"""Rows of different lengths, one number at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Int32 = NDArray[np.int32]


def pack_tokens(
    lanes: Int32, starts: Int32, ends: Int32, tokens: Int32, blocks: Int32, block_size: int
) -> tuple[Int32, Int32, Int32, Int32, Int32]:
    """token_ids, positions, slots, offsets, block_tables; what a row has no block for is -1."""
    used = [-(-int(end) // block_size) for end in ends]
    block_tables = np.full((len(lanes), max(used, default=0)), -1, np.int32)
    token_ids, positions, slots, offsets = [], [], [], [0]
    for row, (lane, start, end) in enumerate(zip(lanes, starts, ends, strict=True)):
        block_tables[row, : used[row]] = blocks[lane, : used[row]]
        for position in range(start, end):
            token_ids.append(tokens[lane, position])
            positions.append(position)
            slots.append(blocks[lane, position // block_size] * block_size + position % block_size)
        offsets.append(len(token_ids))
    return (
        np.array(token_ids, np.int32),
        np.array(positions, np.int32),
        np.array(slots, np.int32),
        np.array(offsets, np.int32),
        block_tables,
    )


def gather(table: Array, rows: Int32, lens: Int32) -> tuple[Int32, Array]:
    """Offsets and values."""
    pieces = [table[row, :length] for row, length in zip(rows, lens, strict=True)]
    return np.cumsum([0, *lens], dtype=np.int32), np.concatenate([table[0, :0], *pieces])


def append(table: Array, lens: Int32, rows: Int32, values: Array) -> None:
    """In place."""
    for row, value in zip(rows, values, strict=True):
        table[row, lens[row]] = value
        lens[row] += 1

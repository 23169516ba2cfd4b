"""Rows of different lengths, which lie in tables [rows, width]: the face of csrc/bindings/ragged.cpp.

`millrace.kernels.reference.ragged` is the definition. Arrays are contiguous; no rows are fine. ValueError: a wrong
dtype or shape, or a row, a length or a position that is not in its table. Runs on the calling thread.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from millrace.kernels import _C

Int32 = NDArray[np.int32]
Number = TypeVar("Number", np.int32, np.float32)


def pack_tokens(
    lanes: Int32, starts: Int32, ends: Int32, tokens: Int32, blocks: Int32, block_size: int
) -> tuple[Int32, Int32, Int32, Int32, Int32]:
    """Gather tokens [starts, ends) of each of the lanes: token_ids, positions, slots, offsets, block_tables of a Batch.

    `tokens` and `blocks`: [lanes, width]; a lane has the blocks of `block_size` tokens that its end needs.
    """
    return _C.pack_tokens(lanes, starts, ends, tokens, blocks, block_size)


def gather(table: NDArray[Number], rows: Int32, lens: Int32) -> tuple[Int32, NDArray[Number]]:
    """Join table[rows[i], :lens[i]]; returns offsets [len(rows) + 1] and the values."""
    return _C.gather(table, rows, lens)


def append(table: Int32, lens: Int32, rows: Int32, values: Int32) -> None:
    """Put values[i] behind the last of row rows[i], in place; `lens` [rows] grows. All or, on an error, none."""
    _C.append(table, lens, rows, values)

"""The loops over every running sequence of a step, native: the face of csrc/bindings/sequences.cpp.

They read and write the fields of `Sequence` in place, in some tens of nanoseconds for each sequence. What they mean is
said in Python in tests/engine/test_loops.py. TypeError where something is not a Sequence or a Row.
"""

from typing import TYPE_CHECKING

from millrace.kernels import _C
from millrace.server.engine.row import Row
from millrace.server.engine.sequence import Sequence, SequenceRequest, SequenceToken, Status
from millrace.server.engine.tenants import Tenant

if TYPE_CHECKING:  # the scheduler runs without NumPy
    import numpy as np
    from numpy.typing import NDArray

    Int32 = NDArray[np.int32]

_LOOPS = _C.SequenceLoops(Sequence, SequenceRequest, Row, SequenceToken, Status.RUNNING)


def sort_running(running: list[Sequence]) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
    """Those that lack more than one token; those that decode in this step; those of these that need a block for it.

    None decodes beyond its limit, nor past a token that its sampling must know: a row names only its last one.
    """
    return _LOOPS.sort_running(running)


def plan_decodes(step: int, decoding: list[Sequence]) -> tuple[list[Row], int, list[Tenant], list[tuple[Tenant, int]]]:
    """The rows of one token of each of the sequences, which are the first of step `step`.

    Further: the tokens that all of them look at; the tenants of each that computes a token of its prompt; how many
    tokens of output which tenant is to be charged for.
    """
    return _LOOPS.plan_decodes(step, decoding)


def commit_plain(rows: list[Row], tokens: list[int]) -> tuple[list[int], list[int]]:
    """Give rows of a step their tokens, where the sequence just goes on: their indices, and those of all other rows.

    Others are untouched: of a sequence that does not run, that ends with this token or its length, that reaches its
    milestone, or whose row samples nothing.
    """
    return _LOOPS.commit_plain(rows, tokens)


def tokens_of(rows: list[Row], accepted: list[int], tokens: list[int]) -> list[SequenceToken | None]:
    """The news of the accepted rows; None where log-probabilities were asked for."""
    return _LOOPS.tokens_of(rows, accepted, tokens)


def running_tokens(rows: list[Row], accepted: list[int], tokens: list[int]) -> "tuple[Int32, Int32]":
    """Lanes and tokens of the accepted rows whose sequences still run."""
    return _LOOPS.running_tokens(rows, accepted, tokens)


def columns(
    rows: list[Row],
) -> "tuple[Int32, Int32, Int32, NDArray[np.bool_], list[tuple[int, tuple[int, int]]]]":
    """Lanes, starts, ends and which of them sample; (row, source) of those that wait for a token."""
    return _LOOPS.columns(rows)

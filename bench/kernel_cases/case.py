"""What a kernel is measured with."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Run = Callable[[], object]


class Case(NamedTuple):
    """`ours` and `peer` run in turn, one after the other: several where one's memory would stay in a cache."""

    kernel: str
    case: str
    ours: Sequence[Run]
    peer: Sequence[Run]
    bytes: float  # that must be read
    operations: float  # a multiplication and its addition being two; 0: none to speak of
    arithmetics: tuple[str, ...] = ("bf16", "fp32")  # loops of the roof that do such operations
    threads: int = 1  # which `ours` takes by itself

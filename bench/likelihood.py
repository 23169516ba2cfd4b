"""How likely logits find a text. NumPy alone: the runners of peers import this in environments of their own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def loss(likely: NDArray[np.float64], window: Sequence[int] | NDArray[Any]) -> float:
    """Negative log likelihood of all tokens of a window but its first, nats.

    `likely`: log-probabilities after all tokens but the last, [tokens - 1, vocabulary].
    """
    return -float(likely[np.arange(len(likely)), np.asarray(window)[1:]].sum())

"""The seam between retrieval and whatever turns texts into vectors."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from millrace.server.types import EmbedderInfo


class Embedded(NamedTuple):
    """`tokens`: what the model read, special tokens included."""

    vectors: NDArray[np.float32]  # [texts, dimensions]
    tokens: int


class Embedder(Protocol):
    """Belongs to one event loop."""

    def info(self) -> EmbedderInfo:
        """Raises Unavailable while the model is not there, FeatureUnsupported where there is none."""

    async def embed(
        self, texts: Sequence[str], *, tenant: str, background: bool = False, truncate: bool = False
    ) -> Embedded:
        """All of the texts, or a RequestError. Cancelling frees what waits.

        A text longer than the model takes is PromptTooLong, or with `truncate` cut to what it takes. `background`
        texts wait behind all others.
        """

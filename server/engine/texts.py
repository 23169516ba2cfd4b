"""Texts on their way to vectors: what was asked, how they wait, and the word for their news."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from millrace.server.errors import QueueFull
from millrace.server.model.executors.base import Float32


@dataclass(frozen=True, slots=True, eq=False)
class TextRequest:
    """One text to embed. `sequence_id` is the caller's, never reused, and no number of a sequence that generates.

    A `background` one waits behind every text that is not.
    """

    sequence_id: int
    request_id: str
    tenant: str
    token_ids: Sequence[int]  # special tokens included
    background: bool = False


class TextVector(NamedTuple):
    """The last word of a text that was embedded: finite numbers, [dimensions]."""

    sequence_id: int
    vector: Float32


class TextQueue:
    """Texts in order of arrival, with bounds on how many wait."""

    def __init__(self, max_texts: int, max_tokens: int):
        self._max_texts, self._max_tokens = max_texts, max_tokens
        self._texts: dict[int, TextRequest] = {}
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, texts: Sequence[TextRequest]) -> None:
        """Queue the texts of one request, all of them or none. Raises QueueFull."""
        tokens = sum(len(text.token_ids) for text in texts)
        too_many = len(self) + len(texts) > self._max_texts
        # A request that exceeds a bound by itself may wait alone; it would never be served otherwise.
        if self._texts and (too_many or self._tokens + tokens > self._max_tokens):
            raise QueueFull(
                f"{len(self)} texts of {self._tokens} tokens wait already; retry later",
                metadata={"waiting_texts": str(len(self)), "waiting_tokens": str(self._tokens)},
            )
        self._texts |= {text.sequence_id: text for text in texts}
        self._tokens += tokens

    def discard(self, sequence_id: int) -> None:
        """Drop a text. An unknown one is ignored."""
        if text := self._texts.pop(sequence_id, None):
            self._tokens -= len(text.token_ids)

    def take(self, most_texts: int, most_tokens: int) -> list[TextRequest]:
        """Remove the texts that have waited longest, as many as fit, but one at least if any waits."""
        taken: list[TextRequest] = []
        for text in self._texts.values():
            most_tokens -= len(text.token_ids)
            if taken and (most_tokens < 0 or len(taken) == most_texts):
                break
            taken.append(text)
        for text in taken:
            self.discard(text.sequence_id)
        return taken

    def check(self) -> None:
        """Raise AssertionError unless the tokens add up."""
        if self._tokens != sum(len(text.token_ids) for text in self._texts.values()):
            raise AssertionError(f"{self._tokens} tokens of texts are said to wait")

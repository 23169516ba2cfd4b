"""What finished requests were answered, for a while."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from millrace.server.types import ChoiceDelta, Deltas, GenerateEvent, Logprobs, Started

SECONDS = 600.0
BYTES = 64 << 20  # of all; beyond, the oldest answers of the tenant with the most are forgotten
BYTES_OF_ONE = BYTES // 4  # a longer answer is not kept

OBJECT, NUMBER = 400, 36  # bytes, about: of an event, of an element of a list


@dataclass(frozen=True, slots=True)
class Record:
    digest: bytes
    events: Sequence[GenerateEvent]
    size: int  # bytes, about
    expiry: asyncio.TimerHandle


class Told:
    """Answers by tenant and request_id, each kept for SECONDS. Of one event loop."""

    def __init__(self) -> None:
        self._records: defaultdict[str, dict[str, Record]] = defaultdict(dict)  # of a tenant, the oldest first
        self._sizes: defaultdict[str, int] = defaultdict(int)

    def get(self, key: tuple[str, str]) -> Record | None:
        tenant, request_id = key
        return self._records[tenant].get(request_id) if tenant in self._records else None

    def keep(self, key: tuple[str, str], digest: bytes, events: Sequence[GenerateEvent]) -> None:
        size = sum(map(size_of, events))
        if size > BYTES_OF_ONE:
            return
        tenant, request_id = key
        expiry = asyncio.get_running_loop().call_later(SECONDS, self._forget, tenant, request_id)
        self._records[tenant][request_id] = Record(digest, events, size, expiry)
        self._sizes[tenant] += size
        while sum(self._sizes.values()) > BYTES:
            most = max(self._sizes, key=self._sizes.__getitem__)
            self._forget(most, next(iter(self._records[most])))

    def _forget(self, tenant: str, request_id: str) -> None:
        record = self._records[tenant].pop(request_id)
        record.expiry.cancel()
        self._sizes[tenant] -= record.size
        if not self._records[tenant]:
            del self._records[tenant], self._sizes[tenant]


def size_of(event: GenerateEvent) -> int:
    """Bytes of memory, about."""
    match event:
        case Started():
            texts = sum(len(source.hit.chunk.text) for source in event.sources)
            return OBJECT + NUMBER * len(event.prompt_ids or ()) + 4 * texts + OBJECT * len(event.sources)
        case Deltas():
            return OBJECT + sum(map(size_of_delta, event.choices))
        case _:
            return OBJECT


def size_of_delta(delta: ChoiceDelta) -> int:
    logprobs = delta.logprobs or Logprobs(0)
    numbers = len(delta.token_ids) + len(logprobs.sampled) + 2 * len(logprobs.top_logprobs)
    return OBJECT + 4 * len(delta.text) + NUMBER * numbers

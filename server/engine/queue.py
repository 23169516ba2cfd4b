"""Who is served next: the one order of service.

    priority class, which waiting improves
    → the tenant that has had least of the engine
    → its sequence that gave way most often → the earliest deadline → arrival

Those whose time is over are gone before the question arises. The same order says which prompts are read first in a
step; nothing here depends on how many wait, but for logarithms.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from millrace.server.engine.heap import Heap
from millrace.server.engine.sequence import Sequence as Seq
from millrace.server.engine.tenants import Tenant
from millrace.server.types import Priority

Place: TypeAlias = tuple[int, float, int, int, int]

PATIENCE_US = 120_000_000  # a sequence without a deadline is ordered as if it had this one, so that it is not passed by


def place(sequence: Seq) -> Place:
    """Of two sequences the one with the lesser place is served first."""
    return sequence.rank, sequence.tenant.counter, *order_within(sequence)


def order_within(sequence: Seq) -> tuple[int, int, int]:
    """Among the sequences of one tenant and class."""
    due = sequence.arrival_us + PATIENCE_US if sequence.due_us is None else sequence.due_us
    return -sequence.preemptions, due, sequence.arrival


def aged_rank(sequence: Seq, now_us: int, ageing_us: int) -> int:
    """The class that a sequence has reached."""
    climbed = (now_us - sequence.arrival_us) // ageing_us
    return max(0, min(sequence.rank, sequence.request.priority - climbed))


class Bucket:
    """The waiting sequences of one tenant and class, and their tokens: of prompts, and expected of outputs."""

    def __init__(self) -> None:
        self.sequences: Heap[Seq] = Heap()
        self.prompt_tokens = self.output_tokens = 0

    def put(self, sequence: Seq) -> None:
        self.sequences.put(sequence, order_within(sequence))
        self.prompt_tokens += sequence.prompt_len
        self.output_tokens += sequence.expected_output

    def remove(self, sequence: Seq) -> None:
        self.sequences.remove(sequence)
        self.prompt_tokens -= sequence.prompt_len
        self.output_tokens -= sequence.expected_output

    def first(self) -> Seq:
        sequence = self.sequences.first()
        if sequence is None:
            raise AssertionError("no bucket is empty")
        return sequence

    @property
    def place(self) -> Place:
        return place(self.first())


class Queue:
    """The waiting sequences. `ageing_us`: how long one waits in a class before it moves up; `tenant_share`: of the
    engine, (0, 1].

    `tokens` are those of their prompts. Some are held: they wait for another choice of their request, not for a turn.
    """

    def __init__(self, ageing_us: int, max_running_of_tenant: int, tenant_share: Callable[[Tenant], float]):
        self._ageing_us, self._max_running, self._tenant_share = ageing_us, max_running_of_tenant, tenant_share
        self._buckets: list[dict[Tenant, Bucket]] = [{} for _ in Priority]
        self._tenants: list[Heap[Tenant]] = [Heap() for _ in Priority]  # by place of their first sequence
        self._ages: Heap[Seq] = Heap()  # by when they move up
        self._fresh: list[OrderedDict[Seq, None]] = [OrderedDict() for _ in Priority]  # nothing of the request ran yet
        self._held: dict[Seq, None] = {}
        self._work = [[0, 0] for _ in Priority]  # prompt tokens, and output tokens that are expected
        self.tokens = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Seq]:
        yield from self._held
        for buckets in self._buckets:
            for bucket in buckets.values():
                yield from bucket.sequences

    def put(self, sequence: Seq, held: bool = False) -> None:
        """Let a sequence wait, anew or again."""
        self._size += 1
        self.tokens += sequence.prompt_len
        sequence.tenant.queued += 1
        if not sequence.group.started:
            self._fresh[sequence.request.priority][sequence] = None
        if held:
            self._held[sequence] = None
        else:
            self._insert(sequence)

    def remove(self, sequence: Seq) -> None:
        self._size -= 1
        self.tokens -= sequence.prompt_len
        sequence.tenant.queued -= 1
        self._fresh[sequence.request.priority].pop(sequence, None)
        if sequence in self._held:
            del self._held[sequence]
        else:
            self._take_out(sequence)

    def let_go(self, sequence: Seq) -> None:
        """What a held sequence waited for is there, or will not come: now it waits for its turn."""
        del self._held[sequence]
        self._insert(sequence)

    def first(self) -> Seq | None:
        """Who is served next. What is noted of a tenant is a lower bound: counters only grow."""
        for buckets, tenants in zip(self._buckets, self._tenants, strict=True):
            while (tenant := tenants.first()) is not None:
                if tenant.running >= self._max_running:
                    tenants.remove(tenant)  # `admissible` brings it back
                    continue
                key = buckets[tenant].place
                if tenants.key(tenant) == key:
                    return buckets[tenant].first()
                tenants.put(tenant, key)
        return None

    def admissible(self, tenant: Tenant) -> None:
        """A tenant runs one sequence less than its bound."""
        for buckets, tenants in zip(self._buckets, self._tenants, strict=True):
            if tenant in buckets:
                tenants.put(tenant, buckets[tenant].place)

    def work_before(self, rank: int) -> tuple[int, int]:
        """Prompt tokens, and output tokens that are expected, of that class and those before it."""
        return sum(prompt for prompt, _ in self._work[: rank + 1]), sum(output for _, output in self._work[: rank + 1])

    def prompt_tokens_beside(self, sequence: Seq) -> int:
        """Prompt tokens of the others that wait in its class and those before it."""
        bucket = self._buckets[sequence.rank].get(sequence.tenant)
        own = sequence.prompt_len if bucket is not None and sequence in bucket.sequences else 0
        return self.work_before(sequence.rank)[0] - own

    def work_of(self, tenant: Tenant, rank: int) -> tuple[int, int]:
        """The same of one tenant."""
        buckets = [b[tenant] for b in self._buckets[: rank + 1] if tenant in b]
        return sum(b.prompt_tokens for b in buckets), sum(b.output_tokens for b in buckets)

    def age(self, now_us: int) -> None:
        """Move up those that have waited long enough in their class."""
        while (sequence := self._ages.first()) is not None and self._ages.key(sequence)[0] <= now_us:
            self._take_out(sequence)
            sequence.rank = aged_rank(sequence, now_us, self._ageing_us)
            self._insert(sequence)

    def started(self, group: Sequence[Seq]) -> None:
        """A sequence of a request runs, so none of them is turned away for want of room any more."""
        for sequence in group:
            self._fresh[sequence.request.priority].pop(sequence, None)

    def displaceable(self, arrival: Tenant, priority: int, most: int) -> Iterator[Seq]:
        """Whose room a newcomer may take: that of lesser classes, the least first; in its own, that of tenants with
        more than their share of the `most` that may wait, if its own has less. Of each the latest come first."""
        for fresh in reversed(self._fresh[priority + 1 :]):
            yield from reversed(fresh)
        if arrival.queued < self._tenant_share(arrival) * most:
            for sequence in reversed(self._fresh[priority]):
                tenant = sequence.tenant
                if tenant is not arrival and tenant.queued > self._tenant_share(tenant) * most:
                    yield sequence

    def check(self) -> None:
        """Raise AssertionError unless the counts agree with what waits."""
        waiting = list(self)
        facts = {
            "size": self._size == len(waiting),
            "tokens": self.tokens == sum(s.prompt_len for s in waiting),
            "classes": all(s.rank == r for r, b in enumerate(self._buckets) for h in b.values() for s in h.sequences),
            "owners": all(s.tenant is t for b in self._buckets for t, h in b.items() for s in h.sequences),
            "work": self.work_before(len(self._work) - 1)
            == (
                sum(s.prompt_len for s in waiting if s not in self._held),
                sum(s.expected_output for s in waiting if s not in self._held),
            ),
            "work of tenants": self._work
            == [
                [sum(h.prompt_tokens for h in b.values()), sum(h.output_tokens for h in b.values())]
                for b in self._buckets
            ],
            "nobody is forgotten": all(
                tenant in tenants or tenant.running >= self._max_running
                for buckets, tenants in zip(self._buckets, self._tenants, strict=True)
                for tenant in buckets
            ),
            "none is empty": all(len(bucket.sequences) for buckets in self._buckets for bucket in buckets.values()),
            "the fresh": {s for s in waiting if not s.group.started} == {s for fresh in self._fresh for s in fresh},
        }
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise AssertionError(f"the queue is wrong about: {', '.join(wrong)}")

    def _insert(self, sequence: Seq) -> None:
        rank, tenant = sequence.rank, sequence.tenant
        bucket = self._buckets[rank].setdefault(tenant, Bucket())
        bucket.put(sequence)
        if bucket.first() is sequence:
            self._tenants[rank].put(tenant, bucket.place)
        self._count(sequence, 1)
        if rank > 0:
            climbed = sequence.request.priority - rank
            self._ages.put(sequence, (sequence.arrival_us + (climbed + 1) * self._ageing_us, sequence.arrival))

    def _take_out(self, sequence: Seq) -> None:
        buckets, tenant = self._buckets[sequence.rank], sequence.tenant
        buckets[tenant].remove(sequence)
        if not len(buckets[tenant].sequences):
            del buckets[tenant]
            self._tenants[sequence.rank].remove(tenant)
        self._count(sequence, -1)
        self._ages.remove(sequence)

    def _count(self, sequence: Seq, sign: int) -> None:
        work = self._work[sequence.rank]
        work[0] += sign * sequence.prompt_len
        work[1] += sign * sequence.expected_output

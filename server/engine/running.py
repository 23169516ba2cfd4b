"""The sequences that run: their lanes and blocks, until the last step that reads these is back."""

from collections.abc import Iterator

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.sequence import Sequence, Status
from millrace.server.types import Priority


class Running:
    """In order of admission. Those that left while a step was in flight keep their blocks until it is back."""

    def __init__(self, pool: BlockPool, lanes: int):
        self._pool, self.total_lanes = pool, lanes
        self.sequences: list[Sequence] = []
        self._of_rank = [0] * len(Priority)
        self._leaving: dict[int, Sequence] = {}  # by arrival
        self._lanes = list(range(lanes - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    @property
    def free_lanes(self) -> int:
        return len(self._lanes)

    @property
    def awaits_blocks(self) -> bool:
        """Whether blocks will be free with the steps in flight."""
        return bool(self._leaving)

    def any_below(self, rank: int) -> bool:
        """Whether one of a lesser class runs."""
        return any(self._of_rank[rank + 1 :])

    def start(self, sequence: Sequence, shared: list[int], fresh: int) -> None:
        """Give a sequence a lane, blocks that it shares, and `fresh` ones of its own."""
        sequence.status = Status.RUNNING
        sequence.lane = self._lanes.pop()
        self._pool.share(shared)
        sequence.blocks = shared + self._pool.allocate(fresh)
        sequence.capacity = len(sequence.blocks) * self._pool.block_size
        sequence.tenant.running += 1
        sequence.tenant.blocks += len(sequence.blocks)
        self._of_rank[sequence.rank] += 1
        self.sequences.append(sequence)

    def grow(self, sequence: Sequence) -> None:
        """Give a sequence one more block, which is free."""
        sequence.blocks += self._pool.allocate(1)
        sequence.capacity += self._pool.block_size
        sequence.tenant.blocks += 1

    def stop(self, sequence: Sequence) -> None:
        """Take the lane of a sequence, and its blocks as soon as no step reads them."""
        self.sequences.remove(sequence)
        self._of_rank[sequence.rank] -= 1
        self._lanes.append(sequence.lane)
        sequence.lane = -1
        sequence.tenant.running -= 1
        sequence.tenant.blocks -= len(sequence.blocks)
        if sequence.in_flight:
            self._leaving[sequence.arrival] = sequence
        else:
            self._release(sequence)

    def landed(self, sequence: Sequence) -> None:
        """A row of a sequence came back. With its last one, the blocks of one that left are free."""
        if sequence.in_flight == 0 and sequence.arrival in self._leaving:
            del self._leaving[sequence.arrival]
            self._release(sequence)

    def check(self) -> None:
        """Raise AssertionError unless lanes, blocks and counts agree."""
        running, leaving = self.sequences, list(self._leaving.values())
        self._pool.check(sequence.blocks for sequence in running + leaving)
        size = self._pool.block_size
        facts = {
            "lanes are held once": sorted([s.lane for s in running] + self._lanes) == list(range(self.total_lanes)),
            "ranks are counted": self._of_rank == [sum(s.rank == rank for s in running) for rank in Priority],
            "the leaving are in flight": all(s.in_flight and s.lane == -1 for s in leaving),
            "they run or left": all(s.status is Status.RUNNING for s in running)
            and all(s.status is not Status.RUNNING for s in leaving),
            "blocks cover what is scheduled": all(s.scheduled <= s.capacity == size * len(s.blocks) for s in running),
            "what is computed was scheduled": all(s.computed <= s.scheduled for s in running),
            "what others may find is computed": all(s.published * size <= s.computed for s in running),
            "milestones lie ahead": all(s.milestone > s.computed for s in running),
        }
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise AssertionError(f"violated: {', '.join(wrong)}")

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []

"""Who gives way when KV blocks or lanes run out.

The victim is of the least class; in it, the one that gave way least often, so that a claim grows with every time; of
those the one with the fewest tokens to compute again; then the latest arrival.
"""

from collections.abc import Iterable

from millrace.server.engine.sequence import Sequence as Seq
from millrace.server.engine.tenants import Tenants

PINNED = 2  # times after which a sequence gives way to no arrival any more, only to those that run


def cost(sequence: Seq) -> tuple[int, int, int, int]:
    """The least gives way first."""
    return -sequence.rank, sequence.preemptions, sequence.scheduled, -sequence.arrival


def cheapest(running: Iterable[Seq]) -> Seq:
    return min(running, key=cost)


class Claim:
    """What an arrival that needs `blocks` may take from those that run.

    From those of a lesser class; and from the same class of a tenant that holds more of the blocks or lanes than its
    share, if the arrival's tenant, with it, holds no more than its own (`is_modest`). So no two tenants take turns at
    giving way.
    """

    def __init__(self, arrival: Seq, blocks: int, tenants: Tenants, total_blocks: int, lanes: int):
        self._arrival, self._tenants, self._total_blocks, self._lanes = arrival, tenants, total_blocks, lanes
        tenant, share = arrival.tenant, tenants.share(arrival.tenant)
        self.is_modest = (
            tenant.blocks + blocks <= share * total_blocks and tenant.running + 1 <= max(1.0, share * lanes)
        ) and tenants.active > 1

    def victims(self, running: Iterable[Seq]) -> list[Seq]:
        """Those that may have to give way, the cheapest first."""
        return sorted(filter(self._takes_from, running), key=cost)

    def _takes_from(self, other: Seq) -> bool:
        arrival, owner = self._arrival, other.tenant
        if other.preemptions >= PINNED or other.rank < arrival.rank:
            return False
        if other.rank > arrival.rank:
            return True
        share = self._tenants.share(owner)
        holds_more = owner.blocks > share * self._total_blocks or owner.running > share * self._lanes
        return self.is_modest and owner is not arrival.tenant and holds_more

"""What each tenant has had of the engine, so that the one that had least comes first.

Virtual token counters after "Fairness in Serving Large Language Models" (VTC, arXiv 2401.00588), weighted: a computed
prompt token counts 1, an output token 2, divided by the tenant's weight. What the prefix cache gives and what is
computed again after a preemption costs nothing. A tenant that comes back from idleness is lifted to the least counter
of those that are there: having asked for nothing earns no credit.
"""

from dataclasses import dataclass

from millrace.server.engine.heap import Heap

PROMPT_COST, OUTPUT_COST = 1, 2  # of a token: w_p and w_q of the paper
MOST_IDLE = 4096  # tenants without requests whose counters are kept


@dataclass(slots=True, eq=False)
class Tenant:
    """`counter` is service in tokens over weight; the others count live, queued and running sequences and KV blocks."""

    name: str
    number: int
    weight: float = 1.0
    counter: float = 0.0
    live: int = 0
    queued: int = 0
    running: int = 0
    blocks: int = 0

    def charge(self, prompt_tokens: int, output_tokens: int) -> None:
        self.counter += (PROMPT_COST * prompt_tokens + OUTPUT_COST * output_tokens) / self.weight


class Tenants:
    """Those with live sequences are active. Counters of up to `most_idle` others are kept, if they say something."""

    def __init__(self, most_idle: int = MOST_IDLE) -> None:
        self.most_idle = most_idle
        self._known: dict[str, Tenant] = {}
        self._active: Heap[Tenant] = Heap()
        self._weight = 0.0
        self._floor = 0.0  # the counter of the last tenant that left when no other was there
        self._arrivals = 0

    @property
    def active(self) -> int:
        return len(self._active)

    def enter(self, name: str, weight: float, count: int) -> Tenant:
        """`count` more live sequences of a tenant, whose weight is `weight` from now on."""
        tenant = self._known.get(name)
        if tenant is None:
            self._forget()
            self._arrivals += 1
            tenant = self._known[name] = Tenant(name, self._arrivals)
        if tenant.live == 0:
            tenant.counter = max(tenant.counter, self._least())
            self._active.put(tenant, (tenant.counter, tenant.number))
        else:
            self._weight -= tenant.weight
        tenant.weight = weight
        self._weight += weight
        tenant.live += count
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """One live sequence less."""
        tenant.live -= 1
        if tenant.live == 0:
            self._active.remove(tenant)
            self._weight -= tenant.weight
            if not self._active:
                self._floor, self._weight = max(self._floor, tenant.counter), 0.0

    def share(self, tenant: Tenant) -> float:
        """The part of the engine that an active tenant is entitled to while all want more, (0, 1]."""
        return tenant.weight / self._weight

    def _least(self) -> float:
        """The least counter of an active tenant. Counters only grow, so what was noted is a lower bound."""
        while (tenant := self._active.first()) is not None:
            key = tenant.counter, tenant.number
            if self._active.key(tenant) == key:
                return tenant.counter
            self._active.put(tenant, key)
        return self._floor

    def _forget(self) -> None:
        """Drop idle counters: first those that the lift would overrule, then the least."""
        if len(self._known) - len(self._active) < self.most_idle:
            return
        least = self._least()
        idle = sorted((t for t in self._known.values() if t.live == 0), key=lambda t: (t.counter, t.number))
        for position, tenant in enumerate(idle):
            if tenant.counter <= least or position < self.most_idle // 2:
                del self._known[tenant.name]

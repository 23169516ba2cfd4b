"""Which blocks a sequence finds computed: of equal beginnings, and of other choices of its request."""

from millrace.server.engine.blocks import BlockPool
from millrace.server.engine.plan import Plan
from millrace.server.engine.queue import Queue
from millrace.server.engine.sequence import Sequence


class Sharing:
    """Blocks are shared whole. The prompt's last one, which each choice writes to, is copied."""

    def __init__(self, pool: BlockPool, queue: Queue):
        self._pool, self._queue = pool, queue

    def find(self, sequence: Sequence) -> tuple[list[int], int | None]:
        """Blocks that hold its first tokens already, and the serial that its next block follows, see `Prefixes.add`.

        One token at least is left, to sample from.
        """
        full, serial, blocks = 0, 0, list[int]()
        if sequence.chain is not None and sequence.request.cache.read:
            full = (sequence.length - 1) // self._pool.block_size
            sequence.extend_chain(sequence.chain, full)
            found = self._pool.prefixes.find(sequence.chain, full)
            blocks, serial = [prefix.block for prefix in found], found[-1].serial if found else 0
        if donor := sequence.donor:
            whole = (sequence.prompt_len - 1) // self._pool.block_size
            return donor.blocks[:whole], serial if len(blocks) == whole else None
        return blocks, serial

    def known_tokens(self, sequence: Sequence) -> int:
        """Tokens of a prompt that need not be computed, as things stand."""
        return len(self.find(sequence)[0]) * self._pool.block_size

    def begin(self, sequence: Sequence, shared: int, serial: int | None, plan: Plan) -> None:
        """The sequence runs, with so many blocks of others: what it need not compute."""
        sequence.scheduled = shared * self._pool.block_size
        donor, last = sequence.donor, sequence.prompt_len - 1
        if donor and last > sequence.scheduled:
            plan.copies.append((donor.blocks[shared], sequence.blocks[shared]))
            sequence.scheduled = last
        sequence.computed = sequence.scheduled
        sequence.published, sequence.last_prefix = shared, serial
        self._let_others(sequence)

    def reached(self, sequence: Sequence, end: int) -> None:
        """The keys and values of the first `end` tokens are there: for others of the tenant, and for other choices."""
        if end // self._pool.block_size > sequence.published:
            self.publish(sequence, end)
        self._let_others(sequence)

    def publish(self, sequence: Sequence, end: int) -> None:
        """Others may find the full blocks among the first `end` tokens."""
        full = end // self._pool.block_size
        if sequence.chain is not None and sequence.request.cache.write:
            sequence.extend_chain(sequence.chain, full)
            for index in range(sequence.published, full):
                if sequence.last_prefix is None:
                    break
                block = sequence.blocks[index]
                sequence.last_prefix = self._pool.publish(sequence.chain, index, sequence.last_prefix, block)
        sequence.published = full

    def ended(self, sequence: Sequence) -> None:
        """If other choices waited for its prompt, the next of them computes it."""
        held = sequence.group.held
        if sequence in held:
            held.remove(sequence)
        elif held:
            self._queue.let_go(held.pop(0))

    def _let_others(self, sequence: Sequence) -> None:
        """Other choices need the prompt computed; then, or until then, the next milestone is a full block."""
        if sequence.computed >= sequence.prompt_len:
            for choice in sequence.group.held:
                self._queue.let_go(choice)
            sequence.group.held = []
        full = (sequence.published + 1) * self._pool.block_size
        sequence.milestone = min(full, sequence.prompt_len) if sequence.group.held else full

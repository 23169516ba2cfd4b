"""A model and its memory without arithmetic, for simulations of the scheduler.

What a KV slot holds is a hash chained over everything before it. So the token that follows is a function of the
sequence's own text, seed and choice, and a block that somebody else wrote to shows at once.
"""

from functools import cache

from millrace.server.engine.plan import Plan
from millrace.server.engine.row import Row
from millrace.server.engine.sequence import SequenceRequest

VOCABULARY = 50
MASK = (1 << 64) - 1


def mix(value: int, word: int) -> int:
    """A hash of 64 bits (the finalizer of SplitMix64)."""
    value = (value ^ (word + 0x9E3779B97F4A7C15)) & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def draw(request: SequenceRequest, chained: int, position: int) -> int:
    """The token at `position`, after a text whose chained hash is `chained`."""
    token = mix(mix(chained, request.sampling.seed), request.choice * 1000 + position) % VOCABULARY
    early = position - len(request.prompt_ids) < request.min_output_tokens
    while early and token in request.stop_token_ids:
        token = (token + 1) % VOCABULARY
    return token


class Truth:
    """What a request must yield whatever runs beside it: its tokens, and what its KV slots hold."""

    def __init__(self, request: SequenceRequest, max_model_len: int):
        self.request = request
        self.tokens = list(request.prompt_ids)
        self.chain: list[int] = []
        for token in self.tokens:
            self.chain.append(mix(self.chain[-1] if self.chain else 0, token))
        limit = min(len(self.tokens) + request.max_output_tokens, max_model_len)
        while len(self.tokens) < limit and not self._stopped():
            self.tokens.append(draw(request, self.chain[-1], len(self.tokens)))
            self.chain.append(mix(self.chain[-1], self.tokens[-1]))

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    def _stopped(self) -> bool:
        return len(self.tokens) > len(self.request.prompt_ids) and self.tokens[-1] in self.request.stop_token_ids


@cache
def blank(size: int) -> tuple[int, ...]:
    return (-1,) * size


class Device:
    """KV blocks, and the block tables that a step reads: those the plans tell, as the packer keeps them."""

    def __init__(self, blocks: int, block_size: int, lanes: int):
        self.block_size = block_size
        self._slots = [list(blank(block_size)) for _ in range(blocks)]
        self._tables: list[list[int]] = [[] for _ in range(lanes)]

    def prepare(self, plan: Plan) -> None:
        """Take over what the plan says of blocks."""
        for source, target in plan.copies:
            self._slots[target][:] = self._slots[source]
        for sequence in plan.admitted:
            self._tables[sequence.lane] = list(sequence.blocks)
        for sequence in plan.grown:
            self._tables[sequence.lane].append(sequence.blocks[-1])

    def run(self, row: Row, truth: Truth, sampled: int | None) -> int:
        """Compute a row and return the token it samples, or -1. `sampled`: its last token, that an earlier row drew."""
        request, size = row.sequence.request, self.block_size
        table = self._tables[row.sequence.lane]
        self._verify(table, row.start, truth)
        known = [*request.prompt_ids, *row.sequence.output]
        chained = self._slots[table[(row.start - 1) // size]][(row.start - 1) % size] if row.start else 0
        for position in range(row.start, row.end):
            token = sampled if sampled is not None and position == row.end - 1 else known[position]
            chained = mix(chained, token)
            self._slots[table[position // size]][position % size] = chained
        return draw(request, chained, row.end) if row.samples else -1

    def _verify(self, table: list[int], length: int, truth: Truth) -> None:
        for index in range(-(-length // self.block_size)):
            start = index * self.block_size
            count = min(self.block_size, length - start)
            held = self._slots[table[index]][:count]
            assert held == truth.chain[start : start + count], "a block holds what is not this text's"

"""Models without arithmetic: the next token is a hash of everything the KV blocks say came before it, the vector of
a text is drawn from a hash of the text."""

import hashlib
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np

from millrace.server.config import EngineConfig
from millrace.server.engine.embedding import EmbeddingEngine
from millrace.server.engine.engine import Engine
from millrace.server.engine.sequence import SequenceFinished, SequenceRequest
from millrace.server.engine.texts import TextRequest
from millrace.server.model.executors.base import Batch, KVLayout, Output, StepResult
from millrace.server.model.executors.texts import check_texts
from millrace.server.types import BackendInfo, EmbedderInfo, FinishReason, Sampling

VOCABULARY = 50
EMBEDDER = EmbedderInfo("hash", "revision-1", dimensions=4, max_tokens=16, vocab_size=VOCABULARY)


def draw(tokens: Iterable[int], seed: int, choice: int, position: int, banned: frozenset[int] = frozenset()) -> int:
    """The token that follows: a wrong token, position, seed or choice anywhere changes it."""
    text = repr((list(tokens), seed, choice, position)).encode()
    token = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) % VOCABULARY
    while token in banned:
        token = (token + 1) % VOCABULARY
    return token


class FakeExecutor:
    """Keeps (position, token) in each KV slot and reads the context back through the block tables."""

    def __init__(self, num_blocks: int, block_size: int):
        self.kv_layout = KVLayout(block_size, num_blocks, 1)
        self.progress = 0
        self.closed = False
        self.batches: list[Batch] = []
        self.poison: Callable[[list[int]], bool] = lambda tokens: False  # what makes a whole step raise
        self.bad_row: Callable[[list[int]], bool] = lambda tokens: False  # what makes one row an error
        self._kv = np.full((num_blocks * block_size, 2), -1)
        self._results: dict[int, tuple[StepResult | Exception, list[int]]] = {}

    def submit(self, batch: Batch) -> int:
        self.batches.append(batch)
        token_ids = batch.token_ids.copy()
        for p in batch.placeholders:
            assert token_ids[p.index] == -1
            token_ids[p.index] = self._results[p.ticket][1][p.row]
        self._kv[batch.slots] = np.stack([batch.positions, token_ids], axis=1)
        tokens, errors, sampled = [], {}, np.flatnonzero(batch.outputs == Output.SAMPLE).tolist()
        failure: Exception | None = None
        for row, length in enumerate(batch.context_lens.tolist()):
            context = self._context(batch.block_tables[row], length)
            if self.poison(context):
                failure = RuntimeError("poison")
            token = self._sample(batch, sampled.index(row), context) if row in sampled else -1
            if self.bad_row(context):
                errors[row], token = "not a number", -1
            tokens.append(token)
        ticket = len(self._results)
        self._results[ticket] = (failure or self._result(tokens, errors), tokens)
        return ticket

    def _context(self, table: np.ndarray, length: int) -> list[int]:
        size = self.kv_layout.block_size
        slots = [table[p // size] * size + p % size for p in range(length)]
        positions, tokens = self._kv[slots].T.tolist()
        assert positions == list(range(length)), "a position was overwritten or never written"
        return tokens

    def _sample(self, batch: Batch, i: int, context: list[int]) -> int:
        s = batch.sampling
        history = s.history_ids[s.history_offsets[i] : s.history_offsets[i + 1]].tolist()
        if s.repetition_penalty[i] != 1:
            assert context in (history, history[: len(context)], [*history, context[-1]])
        else:
            assert history == []
        assert s.position[i] == len(context)
        words = next((mask.words for mask in batch.masks if mask.row == i), None)
        allowed = range(VOCABULARY) if words is None else [v for v in range(VOCABULARY) if words[v // 32] >> v % 32 & 1]
        banned = frozenset(range(VOCABULARY)).difference(allowed)
        return draw(context, int(s.seed[i]), int(s.choice[i]), int(s.position[i]), banned)

    @staticmethod
    def _result(tokens: list[int], errors: dict[int, str]) -> StepResult:
        counts = [int(token >= 0) for token in tokens]
        ids = np.array([token for token in tokens if token >= 0], np.int32)
        top_offsets = np.arange(len(ids) + 1, dtype=np.int32)
        logprobs = -ids.astype(np.float32)
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        return StepResult(offsets, ids, logprobs, top_offsets, ids, logprobs, errors=errors)

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        size = self.kv_layout.block_size
        for source, target in pairs:
            self._kv[target * size : (target + 1) * size] = self._kv[source * size : (source + 1) * size]

    def collect(self, ticket: int) -> StepResult:
        self.progress += 1
        result = self._results[ticket][0]
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self.closed = True


def text_vector(token_ids: Iterable[int]) -> np.ndarray:
    """What a text must become whatever is embedded beside it: another order or another token changes it."""
    digest = hashlib.blake2b(repr(list(token_ids)).encode(), digest_size=4 * EMBEDDER.dimensions).digest()
    return np.frombuffer(digest, "<u4").astype(np.float32)


class FakeEncoder:
    """Keeps the texts of each step."""

    def __init__(self) -> None:
        self.kv_layout = KVLayout(1, 0, 0)
        self.progress = 0
        self.closed = False
        self.steps: list[list[list[int]]] = []
        self.poison: Callable[[list[int]], bool] = lambda tokens: False  # what makes a whole step raise
        self.bad_row: Callable[[list[int]], bool] = lambda tokens: False  # what makes one row an error
        self.vector = text_vector

    def submit(self, batch: Batch) -> int:
        check_texts(batch, EMBEDDER.max_tokens)
        tokens, bounds = batch.token_ids.tolist(), batch.offsets.tolist()
        self.steps.append([tokens[start:end] for start, end in pairwise(bounds)])
        return len(self.steps) - 1

    def collect(self, ticket: int) -> StepResult:
        self.progress += 1
        texts = self.steps[ticket]
        if any(self.poison(text) for text in texts):
            raise RuntimeError("poison")
        pooled = {row: self.vector(text) for row, text in enumerate(texts) if not self.bad_row(text)}
        errors = {row: "not a number" for row, text in enumerate(texts) if self.bad_row(text)}
        none, ids, reals = np.zeros(len(texts) + 1, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
        return StepResult(none, ids, reals, none[:1], ids, reals, pooled, errors)

    def close(self) -> None:
        self.closed = True


def make_text(sequence_id: int, token_ids: Iterable[int] = (1, 2, 3), background: bool = False) -> TextRequest:
    return TextRequest(sequence_id, f"request-{sequence_id}", "tenant", list(token_ids), background)


def make_embedding(**settings: int) -> tuple[EmbeddingEngine, FakeEncoder]:
    encoder = FakeEncoder()
    return EmbeddingEngine(encoder, EMBEDDER, EngineConfig(**settings)), encoder


def solo(request: SequenceRequest, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What a request must yield whatever runs beside it."""
    tokens, prompt = list(request.prompt_ids), len(request.prompt_ids)
    while True:
        early = len(tokens) - prompt < request.min_output_tokens
        banned = request.stop_token_ids if early else frozenset()
        tokens.append(draw(tokens, request.sampling.seed, request.choice, len(tokens), banned))
        if tokens[-1] in request.stop_token_ids:
            return tokens[prompt:], FinishReason.STOP
        if len(tokens) == max_model_len:
            return tokens[prompt:], FinishReason.CONTEXT_LENGTH
        if len(tokens) - prompt == request.max_output_tokens:
            return tokens[prompt:], FinishReason.MAX_TOKENS


def make_request(sequence_id: int, prompt: Iterable[int] = (1, 2, 3), **changes: object) -> SequenceRequest:
    sampling = changes.pop("sampling", Sampling(seed=sequence_id))
    values = {"tenant": "tenant", "choice": 0, "max_output_tokens": 8, **changes}
    return SequenceRequest(sequence_id, f"request-{sequence_id}", prompt_ids=list(prompt), sampling=sampling, **values)


class Clock:
    """Microseconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def make_engine(
    blocks: int = 64, block_size: int = 4, max_model_len: int = 64, steps_in_flight: int = 1, **settings: int
) -> tuple[Engine, FakeExecutor, Clock]:
    info = BackendInfo("f", "fake", "hash", 0, VOCABULARY, max_model_len, block_size, blocks)
    executor, clock = FakeExecutor(blocks, block_size), Clock()
    return Engine(executor, info, EngineConfig(**settings), steps_in_flight, clock_us=clock), executor, clock


def drain(engine: Engine, most_steps: int = 2000) -> tuple[dict[int, list[int]], dict[int, SequenceFinished]]:
    """Step until nothing is left; tokens and finishes by sequence. Checks the invariants after every step."""
    tokens: dict[int, list[int]] = {}
    finished: dict[int, SequenceFinished] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            return tokens, finished
        output = engine.step()
        engine.check()
        for token in output.tokens:
            assert token.sequence_id not in finished
            tokens.setdefault(token.sequence_id, []).append(token.token_id)
        for finish in output.finished:
            assert finish.sequence_id not in finished
            finished[finish.sequence_id] = finish
    raise AssertionError(f"work is left after {most_steps} steps")

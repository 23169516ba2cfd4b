"""The worker as it is started, over a tiny model and a tiny encoder."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from millrace.server.backends.supervisor import Supervisor
from millrace.server.backends.worker_process import Launcher
from millrace.server.config import EngineConfig, SupervisorConfig
from millrace.server.errors import CheckpointError, FeatureUnsupported, PromptTooLong
from millrace.server.model.checkpoint import checkpoint_digest
from millrace.server.model.embedder import embedder_info
from millrace.server.model.executors import create_embedder
from millrace.server.model.executors.texts import pack_texts
from millrace.server.types import EmbedRequest, Sampling, TokenRequest
from millrace.server.worker.main import load_engine


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], make_encoder: Callable[..., Path]
) -> EngineConfig:
    directory = tmp_path_factory.mktemp("models")
    model = make_checkpoint(directory / "model", "LlamaForCausalLM")
    encoder = make_encoder(directory / "encoder")
    return EngineConfig(model=str(model), embedding_model=str(encoder), num_threads=1)


async def test_vectors_and_tokens_are_those_of_the_executors(config: EngineConfig) -> None:
    directory, r = Path(config.embedding_model), random.Random(5)
    info = embedder_info(directory)
    texts = [[r.randrange(info.vocab_size) for _ in range(r.choice((1, 2, 31, 32, 33, 100)))] for _ in range(12)]
    executor = create_embedder(config, directory, lambda done, total: None).executor

    def vectors(*rows: list[int]) -> list[bytes]:
        pooled = executor.collect(executor.submit(pack_texts(rows))).pooled
        return [pooled[row].astype("<f4").tobytes() for row in range(len(rows))]

    digest = checkpoint_digest(config.checkpoint)
    supervisor = Supervisor(Launcher(config), SupervisorConfig(), digest, embedder_revision=info.revision)
    try:
        await supervisor.start()
        backend = supervisor.backend
        assert backend.embedder() == info
        assert await backend.embed(EmbedRequest("together", "t", texts)) == vectors(*texts)
        for text in texts[:4]:
            assert await backend.embed(EmbedRequest("alone", "t", [text])) == vectors(text)

        async def answer() -> list[int]:
            stream = await backend.generate(TokenRequest("g", "t", [5, 6, 7], Sampling(seed=3), max_output_tokens=40))
            return [token async for deltas in stream for delta in deltas for token in delta.token_ids]

        quiet = await answer()
        many = EmbedRequest("many", "t", texts * 10, background=True)
        loud, embedded = await asyncio.gather(answer(), backend.embed(many))
        assert loud == quiet
        for vector, expected in zip(embedded, vectors(*texts) * 10, strict=True):  # in other company, so not to the bit
            np.testing.assert_allclose(np.frombuffer(vector, "<f4"), np.frombuffer(expected, "<f4"), atol=1e-5)
        with pytest.raises(PromptTooLong):
            await backend.embed(EmbedRequest("long", "t", [[1] * (info.max_tokens + 1)]))
    finally:
        await supervisor.close()


def test_loading_with_an_embedder_or_without(config: EngineConfig) -> None:
    told: list[tuple[int, int]] = []
    engine = load_engine(config, lambda done, total: told.append((done, total)))
    assert engine.embedder == embedder_info(Path(config.embedding_model))
    assert len({total for _, total in told}) == 2  # one for each model
    engine.close()
    engine = load_engine(config.model_copy(update={"embedding_model": "off"}), lambda done, total: None)
    assert engine.embedder is None
    with pytest.raises(FeatureUnsupported):
        engine.embed()
    engine.close()
    with pytest.raises(CheckpointError, match="there is no such directory"):
        load_engine(config.model_copy(update={"embedding_model": "/nowhere"}), lambda done, total: None)

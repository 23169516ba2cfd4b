"""A worker of the native runtime: PyTorch is not in its process, and need not be installed."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from millrace.server.backends.worker_client import EngineClient
from millrace.server.types import EmbedRequest, Sampling, TokenRequest


@pytest.fixture(scope="module")
def models(
    make_checkpoint: Callable[..., Path], make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    model = make_checkpoint(directory / "model", "LlamaForCausalLM")
    return {"model": str(model), "embedding_model": str(make_encoder(directory / "encoder"))}


@contextmanager
def worker(directory: Path, *path: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address once it is ready, or why it is not. `path`: what its imports find first."""
    places = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "millrace.server.worker.main", "--listen", f"unix:{directory}/socket"]
    with subprocess.Popen(
        [*command, "--engine-config", json.dumps(settings | {"num_threads": 1})],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            event = next(event for line in process.stdout if (event := json.loads(line))["event"] != "loading")
            yield process, event.get("address") or event["message"]
        finally:
            process.kill()


async def use(address: str) -> list[int]:
    client = EngineClient()
    await client.connect(address)
    stream = await client.generate(TokenRequest("g", "t", [5, 6, 7], Sampling(seed=3), max_output_tokens=8))
    tokens = [token async for deltas in stream for delta in deltas for token in delta.token_ids]
    [vector] = await client.embed(EmbedRequest("e", "t", [[6, 7, 8]]))
    await client.close()
    assert len(vector) == 48 * 4
    return tokens


@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_what_a_worker_has_mapped(models: dict[str, str], executor: str, tmp_path: Path) -> None:
    """After it has generated and embedded; of the reference it is PyTorch indeed, or this would look for nothing."""
    with worker(tmp_path, executor=executor, **models) as (process, address):
        assert asyncio.run(use(address))
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert ("libtorch" in mapped) == (executor == "reference")
    assert "/_C." in mapped


def test_serving_where_pytorch_cannot_be_imported(models: dict[str, str], tmp_path: Path) -> None:
    for name in ("torch", "transformers", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    with worker(tmp_path, tmp_path, **models) as (_, address):
        assert asyncio.run(use(address))
    with worker(tmp_path, tmp_path, executor="reference", **models) as (_, message):
        assert message == "the reference executor needs PyTorch: pip install torch==2.13.0"

"""What a model's own files say about generation: generation_config.json, else config.json."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from millrace.server.errors import CheckpointError
from millrace.server.types import Sampling


class GenerationConfig(BaseModel):
    """The keys of generation_config.json that we honour; null is unset. Ranges: generation.proto."""

    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_048_576)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=4)
    eos_token_id: int | list[int] | None = None

    @property
    def sampling(self) -> Sampling:
        """`do_sample: false` is temperature 0; where the file says nothing, sampling is plain."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Sampling(**given | ({"temperature": 0.0} if self.do_sample is False else {}))

    @property
    def stop_token_ids(self) -> frozenset[int]:
        ids = self.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def read_generation_config(directory: Path, eos_id: int | None = None) -> GenerationConfig:
    """Read the defaults of a checkpoint. End-of-sequence tokens come from generation_config.json, else
    config.json, else `eos_id`, the tokenizer's. Raises CheckpointError, one line."""
    config = _read(directory / "generation_config.json")
    if config.eos_token_id is None:
        ids = _read(directory / "config.json", only="eos_token_id").eos_token_id
        config = config.model_copy(update={"eos_token_id": eos_id if ids is None else ids})
    return config


def _read(path: Path, only: str | None = None) -> GenerationConfig:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return GenerationConfig.model_validate({only: values.get(only)} if only else values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {name}: {first['msg']}, got {first['input']!r}".replace("\n", " ")) from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON object: {error}".replace("\n", " ")) from None

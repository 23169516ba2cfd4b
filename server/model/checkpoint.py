"""A checkpoint directory: what its files say, checked before anything large is read.

Nothing of a directory is ever executed. Files may be links (the Hugging Face cache links to its blobs), but
shards are named by plain file names.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from millrace.server.errors import CheckpointError
from millrace.server.model.fields import Fields, read_object
from millrace.server.model.pooling import read_pooling
from millrace.server.model.registry import encoder_spec, model_spec
from millrace.server.model.safetensors import SafetensorsFile
from millrace.server.model.spec import ModelSpec
from millrace.server.types import Sampling

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What `generation_config.json` recommends; its own defaults where there is no such file."""

    sampling: Sampling
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened directory. `shards` maps each tensor name to the file that holds it. An encoder generates nothing."""

    directory: Path
    config: Fields
    spec: ModelSpec
    generation: GenerationDefaults | None
    shards: Mapping[str, SafetensorsFile]

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Read everything but the weights. Raises CheckpointError, one line naming file and fault."""
        config = read_config(directory)
        spec = model_spec(config)
        return cls(directory, config, spec, read_generation(directory, config), _find_shards(directory))

    @classmethod
    def open_encoder(cls, directory: Path) -> "Checkpoint":
        """The same of a sentence-transformers directory."""
        config = read_config(directory)
        spec = encoder_spec(config)
        spec = replace(spec, pooling=read_pooling(directory, spec.hidden_size))
        return cls(directory, config, spec, None, _find_shards(directory))

    def fingerprint(self, executor: str, precision: str, build: Sequence[str]) -> str:
        """Name what is computed: workers of equal fingerprint give equal results.

        `build`: what else decides the last bits, such as the instruction set and the versions of libraries.

        SHA-256 over `config.json`, each file's size, header and 256 evenly spaced samples of 4 KiB, the
        executor, the precision, `build` and the version of this package. Samples, so that it takes no second pass
        over the weights: it tells checkpoints apart, it does not defend against forgery.
        """
        facts = [executor, precision, _package_version(), *build]
        digest = hashlib.sha256("".join(f"{fact}\0" for fact in facts).encode())
        digest.update((self.directory / "config.json").read_bytes())
        files = {file.path.name: file for file in self.shards.values()}
        for _, file in sorted(files.items()):
            digest.update(f"{file.size}\0".encode())
            with file.path.open("rb") as stream:
                digest.update(stream.read(file.data_start))
                for index in range(SAMPLES):
                    stream.seek(file.data_start + (file.size - file.data_start) * index // SAMPLES)
                    digest.update(stream.read(SAMPLE_BYTES))
        return digest.hexdigest()


def checkpoint_digest(directory: Path) -> str:
    """SHA-256 over `config.json` and `tokenizer.json`: what a gateway and its worker must have in common.

    Neither needs the weights for it, which the gateway may not have. Raises CheckpointError.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        path = _find_file(directory, name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        digest.update(f"{len(content)}\0".encode() + content)
    return digest.hexdigest()


def read_config(directory: Path) -> Fields:
    return read_object(_find_file(directory, "config.json"))


def _find_file(directory: Path, name: str) -> Path:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: there is no such checkpoint directory; --model takes one, or 'builtin', "
            f"and --embedding-model one, 'auto' or 'off'"
        )
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; a checkpoint directory holds one")
    return path


def read_generation(directory: Path, config: Fields) -> GenerationDefaults:
    """Read `generation_config.json`; end-of-sequence ids that it lacks come from `config.json`.

    `do_sample` of false means greedy; where it is missing the other values stand.
    """
    path = directory / "generation_config.json"
    given = read_object(path) if path.is_file() else Fields({}, str(path))
    last = config.integer("vocab_size", 1, 1 << 24) - 1
    source = given if "eos_token_id" in given else config
    greedy = not given.flag("do_sample", True)
    sampling = Sampling(
        temperature=0.0 if greedy else given.number("temperature", 0, 2, 1.0),
        top_p=given.number("top_p", 1e-6, 1, 1.0),
        top_k=given.integer("top_k", 0, 1 << 20, 0),
        min_p=given.number("min_p", 0, 1, 0.0),
        repetition_penalty=given.number("repetition_penalty", 1e-6, 4, 1.0),
    )
    return GenerationDefaults(
        sampling=sampling,
        eos_token_ids=tuple(source.integers("eos_token_id", 0, last)),
    )


def _find_shards(directory: Path) -> dict[str, SafetensorsFile]:
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        file = SafetensorsFile.open(single)
        return dict.fromkeys(file.tensors, file)
    if index.is_file():
        return _read_index(directory, read_object(index))
    other = next((path.name for path in sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pth"))), None)
    hint = f"; {other} is a format that can run code: save the model again as safetensors" if other else ""
    raise CheckpointError(f"{directory}: holds neither {SINGLE} nor {INDEX}{hint}")


def _read_index(directory: Path, index: Fields) -> dict[str, SafetensorsFile]:
    names = index.section("weight_map")
    files: dict[str, SafetensorsFile] = {}
    shards: dict[str, SafetensorsFile] = {}
    for tensor in names.values:
        name = names.string(tensor)
        if name not in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise names.error(tensor, f"names {name!r}, which is no safetensors file beside the index")
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory / name}: this shard is missing; the index names it")
            files[name] = SafetensorsFile.open(directory / name)
        if tensor not in files[name].tensors:
            raise CheckpointError(f"{directory / name}: tensor {tensor} is missing; the index says it is here")
        shards[tensor] = files[name]
    return shards


def _package_version() -> str:
    try:
        return version("millrace")
    except PackageNotFoundError:  # run from a source tree
        return "source"

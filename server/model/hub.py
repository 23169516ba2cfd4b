"""From the name of a model to its directory: built in, a directory, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from millrace.server.config import EngineConfig
from millrace.server.errors import CheckpointError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.json", "*.safetensors", "*.jinja"]
SUBFOLDERS = ["*/*"]  # other formats of the same weights


def locate(config: EngineConfig) -> EngineConfig:
    """The same settings with `model` as a directory; a repository is downloaded unless the local cache has it.

    Variables of the hub's own library hold: HF_HOME (where the cache is), HF_HUB_OFFLINE, HF_TOKEN. Raises
    CheckpointError if `model` names a repository that cannot be had. Whether a directory is one that can be
    served is not checked here.
    """
    if config.model == "builtin" or config.checkpoint.exists() or not REPOSITORY.fullmatch(config.model):
        return config
    return config.model_copy(update={"model": str(download(config.model))})


def download(repository: str) -> Path:
    """The directory of a repository's newest snapshot; without a network, of the one in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=WANTED, ignore_patterns=SUBFOLDERS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"--model {repository}: no such directory, and no such repository could be downloaded: {reason}"
        ) from error

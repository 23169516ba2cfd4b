"""What a sentence-transformers directory says about the way from hidden states to a vector.

`modules.json` lists the steps, each with a folder of its own; steps, modes and settings that would change the vector
and are not supported are refused by name. A directory without it is refused too: a vector pooled in another way
than the model was trained with looks well and finds little.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from millrace.server.errors import CheckpointError
from millrace.server.model.fields import Fields, read_object, read_objects
from millrace.server.model.spec import PoolingSpec

MODULES = "modules.json"
STEPS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
FLAG = "pooling_mode_"  # one flag for each mode; newer releases name the mode instead
MODES: dict[str, Literal["mean", "cls"]] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}


def read_pooling(directory: Path, dimensions: int) -> PoolingSpec:
    """`dimensions`: of a hidden state. Raises CheckpointError naming file and setting."""
    normalize = len(_read_modules(directory)) == len(STEPS[1])
    config = read_object(pooling_config(directory))
    modes = _modes(config)
    if len(modes) != 1 or modes[0] not in MODES:
        raise config.error("pooling_mode", f"is {' and '.join(modes) or 'not given'}; supported are mean and cls")
    width = "embedding_dimension" if "embedding_dimension" in config else "word_embedding_dimension"
    if config.integer(width, 1, 1 << 24, dimensions) != dimensions:
        raise config.error(width, f"is {config.values[width]}; config.json says {dimensions}")
    if not config.flag("include_prompt", True):
        raise config.error("include_prompt", "is false: prompts that are left out of pooling are not supported")
    _check_changes_of_text(directory)
    return PoolingSpec(MODES[modes[0]], normalize)


def pooling_config(directory: Path) -> Path:
    """The file that says how to pool; not opened here. Raises CheckpointError."""
    module = _read_modules(directory)[1]
    folder = module.string("path")
    if not folder or Path(folder).name != folder:
        raise module.error("path", f"is {folder!r}, which is no folder beside {MODULES}")
    return directory / folder / "config.json"


def _read_modules(directory: Path) -> Sequence[Fields]:
    path = directory / MODULES
    if not path.is_file():
        raise CheckpointError(
            f"{path}: is missing, and with it how vectors are pooled: give a directory that sentence-transformers saved"
        )
    modules = read_objects(path)
    types = [module.string("type") for module in modules]
    names = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name in types]
    if names not in STEPS:
        raise CheckpointError(
            f"{path}: its steps are {', '.join(names) or 'none'}; supported are Transformer, Pooling, perhaps Normalize"
        )
    folder = modules[0].string("path", "")
    if folder:
        raise modules[0].error("path", f"is {folder!r}: move that folder's files beside {MODULES} and make it empty")
    return modules


def _modes(config: Fields) -> list[str]:
    if isinstance(config.values.get("pooling_mode"), list):
        return config.strings("pooling_mode")
    if "pooling_mode" in config:
        return [config.string("pooling_mode")]
    return [name.removeprefix(FLAG) for name in config.values if name.startswith(FLAG) and config.flag(name)]


def _check_changes_of_text(directory: Path) -> None:
    """Refuse what would change a text before it is read: its case, or a prompt put before it."""
    path = directory / "sentence_bert_config.json"
    if path.is_file():
        config = read_object(path)
        if config.flag("do_lower_case", False):
            raise config.error("do_lower_case", "is true, which is not supported: tokenizer.json must lower the case")
    path = directory / "config_sentence_transformers.json"
    if path.is_file():
        config = read_object(path)
        name = config.string("default_prompt_name", "")
        if name and config.section("prompts").string(name, ""):
            raise config.error("default_prompt_name", f"is {name!r}: a prompt before every text is not supported")

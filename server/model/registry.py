"""Which architectures there are: the name in `config.json` -> its mapping to a `ModelSpec`."""

from collections.abc import Callable

from millrace.server.errors import CheckpointError
from millrace.server.model.fields import Fields
from millrace.server.model.llama import llama
from millrace.server.model.mistral import mistral
from millrace.server.model.qwen import qwen2, qwen3
from millrace.server.model.spec import ModelSpec

ARCHITECTURES: dict[str, Callable[[Fields, str], ModelSpec]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def model_spec(config: Fields) -> ModelSpec:
    """Map a `config.json`. CheckpointError names what is not supported, and what is."""
    if "quantization_config" in config:
        raise config.error("quantization_config", "is set: quantized checkpoints are not supported")
    names = config.strings("architectures")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name](config, name)
    raise CheckpointError(
        f"{config.origin}: architecture {', '.join(names) or 'unnamed'} is not supported; "
        f"supported are {', '.join(ARCHITECTURES)}"
    )

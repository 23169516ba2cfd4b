"""Which architectures there are: the name in `config.json` -> its mapping to a `ModelSpec`."""

from collections.abc import Callable, Mapping

from millrace.server.errors import CheckpointError
from millrace.server.model.bert import bert, distilbert, roberta
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
ENCODERS: dict[str, Callable[[Fields, str], ModelSpec]] = {
    "BertModel": bert,
    "RobertaModel": roberta,
    "XLMRobertaModel": roberta,
    "DistilBertModel": distilbert,
}


def model_spec(config: Fields) -> ModelSpec:
    """Map the `config.json` of a model that writes. CheckpointError names what is not supported, and what is."""
    return _map(config, ARCHITECTURES, ENCODERS, "embeds texts: give it as --embedding-model")


def encoder_spec(config: Fields) -> ModelSpec:
    """Map the `config.json` of a model that embeds, all but its pooling; errors as of `model_spec`."""
    return _map(config, ENCODERS, ARCHITECTURES, "writes texts: give it as --model")


def _map(
    config: Fields,
    table: Mapping[str, Callable[[Fields, str], ModelSpec]],
    others: Mapping[str, Callable[[Fields, str], ModelSpec]],
    advice: str,
) -> ModelSpec:
    """`advice`: what to do with an architecture that is one of the `others`."""
    if "quantization_config" in config:
        raise config.error("quantization_config", "is set: quantized checkpoints are not supported")
    names = config.strings("architectures")
    for name in names:
        if name in table:
            return table[name](config, name)
    hint = next((f"; {name} {advice}" for name in names if name in others), "")
    raise CheckpointError(
        f"{config.origin}: architecture {', '.join(names) or 'unnamed'} is not supported; "
        f"supported are {', '.join(table)}{hint}"
    )

"""Llama 1 to 3.2, and the many models that keep its name."""

from millrace.server.model.decoder import Sizes, decoder_spec
from millrace.server.model.fields import Fields
from millrace.server.model.spec import ModelSpec


def llama(config: Fields, architecture: str) -> ModelSpec:
    """Biases of attention and MLP are optional; every layer sees the whole context."""
    sizes = Sizes.read(config)
    bias = config.flag("attention_bias", False)
    return decoder_spec(
        config,
        architecture,
        sizes,
        windows=(None,) * sizes.layers,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )

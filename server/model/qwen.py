"""Qwen2 (also 2.5) and Qwen3, the dense models."""

from millrace.server.model.decoder import Sizes, decoder_spec, sliding_window
from millrace.server.model.fields import Fields
from millrace.server.model.spec import ModelSpec

LAYER_TYPES = ("full_attention", "sliding_attention")


def qwen2(config: Fields, architecture: str) -> ModelSpec:
    """Llama with biases on queries, keys and values."""
    sizes = Sizes.read(config)
    return decoder_spec(config, architecture, sizes, windows=_windows(config, sizes.layers), qkv_bias=True)


def qwen3(config: Fields, architecture: str) -> ModelSpec:
    """Llama with norms on queries and keys, and heads of a size of their own."""
    sizes = Sizes.read(config, head_dim=128)
    bias = config.flag("attention_bias", False)
    windows = _windows(config, sizes.layers)
    return decoder_spec(config, architecture, sizes, windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _windows(config: Fields, layers: int) -> tuple[int | None, ...]:
    """`layer_types` says which layers slide; without it those from `max_window_layers` on do.

    No layer slides unless `use_sliding_window` is set.
    """
    window = sliding_window(config) if config.flag("use_sliding_window", False) else None
    if "layer_types" in config:
        types = config.strings("layer_types")
        if len(types) != layers:
            raise config.error("layer_types", f"has {len(types)} entries for {layers} layers")
        for kind in types:
            if kind not in LAYER_TYPES:
                raise config.error("layer_types", f"holds {kind!r}; supported are {', '.join(LAYER_TYPES)}")
    else:
        first = config.integer("max_window_layers", 0, 1 << 16, 28)
        types = [LAYER_TYPES[index >= first] for index in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in types)

"""Mistral: Llama with one sliding window for all layers, or none."""

from millrace.server.model.decoder import Sizes, decoder_spec, sliding_window
from millrace.server.model.fields import Fields
from millrace.server.model.spec import ModelSpec


def mistral(config: Fields, architecture: str) -> ModelSpec:
    """Nothing but the window differs."""
    sizes = Sizes.read(config, kv_heads=8)
    return decoder_spec(config, architecture, sizes, windows=(sliding_window(config),) * sizes.layers)

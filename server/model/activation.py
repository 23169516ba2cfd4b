"""Activation functions by the names that a `config.json` gives them."""

from millrace.server.model.fields import Fields
from millrace.server.model.spec import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_activation(config: Fields, name: str, default: str) -> Activation:
    """Read the field `name`. CheckpointError for a function that is not supported."""
    activation = config.string(name, default)
    if activation not in ACTIVATIONS:
        raise config.error(name, f"is {activation!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]

"""What a model is, as plain data: derived from `config.json`, implemented once by each executor.

Architectures differ in values, not in code. A pipeline stage is a slice of `ModelSpec.layers`. A value that
no architecture here uses yet has no spelling: each Literal lists what every executor implements.
"""

from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the checkpoint. `role` is what executors call it, `name` what the file calls it.

    Roles of a layer: `q k v o gate up down` (matrices [out, in]), the same with `_bias`, `q_norm k_norm`,
    `attention_norm mlp_norm`; of the model: `embedding`, `final_norm`, `head`.
    """

    role: str
    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long waves divided by `factor`, short ones kept, a smooth passage between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Interpolation by parts with an attention temperature (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Rotary positions over all of a head, first half against second half. Frequencies: `rotary.py`."""

    dim: int
    theta: float
    scaling: RotaryScaling | None = None


@dataclass(frozen=True, slots=True)
class NormSpec:
    kind: Literal["rms"]
    place: Literal["pre"]
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """`window`: a token sees itself and the `window` - 1 tokens before it; None: all of them."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    position: RotarySpec
    causal: Literal[True] = True
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    soft_cap: None = None


@dataclass(frozen=True, slots=True)
class MLPSpec:
    kind: Literal["gated"]
    size: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    norm: NormSpec
    attention: AttentionSpec
    mlp: MLPSpec
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """`context`: tokens that positions are good for. With `tied`, the head is the embedding."""

    architecture: str
    vocab_size: int
    hidden_size: int
    context: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tied: bool
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()  # endings of tensor names that checkpoints carry and nobody needs
    logit_soft_cap: None = None

    @property
    def all_weights(self) -> tuple[Weight, ...]:
        """Every tensor the checkpoint must hold, in the order of use."""
        return (*self.weights, *(weight for layer in self.layers for weight in layer.weights))

    @property
    def parameters(self) -> int:
        """Numbers in all weights; a tied head counts once."""
        total = 0
        for weight in self.all_weights:
            count = 1
            for size in weight.shape:
                count *= size
            total += count
        return total

    @property
    def kv_floats_per_token(self) -> int:
        """Numbers that keys and values of one token take over all layers."""
        return sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in self.layers)

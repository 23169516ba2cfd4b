"""What a model is, as plain data: derived from `config.json`, implemented once by each executor.

Architectures differ in values, not in code. A pipeline stage is a slice of `ModelSpec.layers`. A value that
no architecture here uses yet has no spelling: each Literal lists what every executor implements.
"""

from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the checkpoint. `role` is what executors call it, `name` what the file calls it.

    Roles of a layer: `q k v o gate up down` (matrices [out, in]), `q_norm k_norm`, `attention_norm mlp_norm`; of
    the model: `embedding position_embedding token_type_embedding` (tables), `embedding_norm final_norm`, `head`;
    the bias that belongs to any of them ends in `_bias`.
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
    """`layer` (Ba et al. 2016, arXiv:1607.06450) has a bias, `rms` has none.

    `pre`: of what goes into attention or MLP; `post`: of the sum of what goes in and what comes out.
    """

    kind: Literal["rms", "layer"]
    place: Literal["pre", "post"]
    eps: float


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """What a token becomes before the first layer: the sum of its rows in each table there is, then a norm.

    `positions` and `token_types` are rows of learned tables, 0 where there is none. A token at position p takes
    row `position_offset` + p of the first, and row 0 of the second: texts here are no pairs.
    """

    positions: int = 0
    position_offset: int = 0
    token_types: int = 0
    norm: NormSpec | None = None


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """How the last hidden states of a text become its vector: their mean, or that of the first token (`cls`).

    `normalize`: divided by its Euclidean length.
    """

    kind: Literal["mean", "cls"]
    normalize: bool


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """`window`: a token sees itself and the `window` - 1 tokens before it; None: all of them.

    Not `causal`: it sees every token of the text. `position` None: what is known of positions is in the input.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    position: RotarySpec | None
    causal: bool = True
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    soft_cap: None = None


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """`gated`: down(activation(gate(x)) * up(x)); `plain`: down(activation(up(x)))."""

    kind: Literal["gated", "plain"]
    size: int
    activation: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    norm: NormSpec
    attention: AttentionSpec
    mlp: MLPSpec
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """`context`: tokens that positions are good for. With `tied`, the head is the embedding.

    A model with `pooling` is an encoder: it has no head. The vector of a text by a model without is the last
    token's hidden state after the final norm.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    context: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    tied: bool
    weights: tuple[Weight, ...]
    embedding: EmbeddingSpec = EmbeddingSpec()
    pooling: PoolingSpec | None = None
    ignored: tuple[str, ...] = ()  # endings of tensor names that checkpoints carry and nobody needs
    logit_soft_cap: None = None

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one, so that the keys and values of a beginning can be kept."""
        return all(layer.attention.causal for layer in self.layers)

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
        """Numbers that the keys and values kept of one token take over all layers."""
        kept = (layer.attention for layer in self.layers if layer.attention.causal)
        return sum(2 * attention.kv_heads * attention.head_dim for attention in kept)

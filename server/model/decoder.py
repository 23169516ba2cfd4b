"""The family that Llama began: pre-norm decoders with rotary positions, gated MLPs and no biases but a few.

Each architecture of the family is a mapping from `config.json` to `decoder_spec`; the weight names are those
of the public checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from millrace.server.model.activation import read_activation
from millrace.server.model.fields import Fields
from millrace.server.model.rotary import context_of, rotary_spec
from millrace.server.model.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, Weight


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers that every config of the family holds."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def read(cls, config: Fields, *, kv_heads: int | None = None, head_dim: int | None = None) -> "Sizes":
        """`kv_heads`, `head_dim`: what a missing field means; by default as many as heads, hidden / heads."""
        hidden, heads = config.integer("hidden_size", 1, 1 << 17), config.integer("num_attention_heads", 1, 4096)
        if head_dim is None and "head_dim" not in config and hidden % heads:
            raise config.error("hidden_size", f"({hidden}) must be a multiple of num_attention_heads ({heads})")
        sizes = cls(
            hidden=hidden,
            mlp=config.integer("intermediate_size", 1, 1 << 20),
            layers=config.integer("num_hidden_layers", 1, 1024),
            heads=heads,
            kv_heads=config.integer("num_key_value_heads", 1, heads, kv_heads or heads),
            head_dim=config.integer("head_dim", 2, 4096, head_dim or hidden // heads),
            vocab=config.integer("vocab_size", 1, 1 << 24),
        )
        if sizes.heads % sizes.kv_heads:
            raise config.error("num_attention_heads", f"({heads}) must be a multiple of num_key_value_heads")
        if sizes.head_dim % 2:
            raise config.error("head_dim", f"must be even for rotary positions, not {sizes.head_dim}")
        return sizes


def decoder_spec(
    config: Fields,
    architecture: str,
    sizes: Sizes,
    *,
    windows: Sequence[int | None],
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """`windows`: one for each layer."""
    norm = NormSpec("rms", "pre", config.number("rms_norm_eps", 0, 1, 1e-6))
    mlp = MLPSpec("gated", sizes.mlp, read_activation(config, "hidden_act", "silu"), mlp_bias)
    rotary = rotary_spec(config, sizes.head_dim)

    def layer(index: int, window: int | None) -> LayerSpec:
        attention = AttentionSpec(
            heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, scale=sizes.head_dim**-0.5,
            position=rotary, window=window, qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=qk_norm,
        )  # fmt: skip
        return LayerSpec(norm, attention, mlp, _layer_weights(index, sizes.hidden, attention, mlp))

    tied = config.flag("tie_word_embeddings", False)
    outer = [
        Weight("embedding", "model.embed_tokens.weight", (sizes.vocab, sizes.hidden)),
        Weight("final_norm", "model.norm.weight", (sizes.hidden,)),
    ]
    if not tied:
        outer.append(Weight("head", "lm_head.weight", (sizes.vocab, sizes.hidden)))
    return ModelSpec(
        architecture=architecture,
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        context=context_of(config, rotary),
        layers=tuple(layer(index, window) for index, window in enumerate(windows)),
        final_norm=norm,
        tied=tied,
        weights=tuple(outer),
        ignored=(".rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())),
    )


def sliding_window(config: Fields) -> int | None:
    """Null means none; where the field is missing it means 4096, as in the first releases that had it."""
    if "sliding_window" in config.values and "sliding_window" not in config:
        return None
    return config.integer("sliding_window", 1, 1 << 24, 4096)


def _layer_weights(index: int, hidden: int, a: AttentionSpec, mlp: MLPSpec) -> tuple[Weight, ...]:
    prefix, q, kv = f"model.layers.{index}", a.heads * a.head_dim, a.kv_heads * a.head_dim
    weights = [
        Weight("attention_norm", f"{prefix}.input_layernorm.weight", (hidden,)),
        Weight("mlp_norm", f"{prefix}.post_attention_layernorm.weight", (hidden,)),
    ]

    def linear(role: str, module: str, out: int, into: int, bias: bool) -> None:
        weights.append(Weight(role, f"{prefix}.{module}.weight", (out, into)))
        if bias:
            weights.append(Weight(f"{role}_bias", f"{prefix}.{module}.bias", (out,)))

    linear("q", "self_attn.q_proj", q, hidden, a.qkv_bias)
    linear("k", "self_attn.k_proj", kv, hidden, a.qkv_bias)
    linear("v", "self_attn.v_proj", kv, hidden, a.qkv_bias)
    linear("o", "self_attn.o_proj", hidden, q, a.o_bias)
    if a.qk_norm:
        weights.append(Weight("q_norm", f"{prefix}.self_attn.q_norm.weight", (a.head_dim,)))
        weights.append(Weight("k_norm", f"{prefix}.self_attn.k_norm.weight", (a.head_dim,)))
    linear("gate", "mlp.gate_proj", mlp.size, hidden, mlp.bias)
    linear("up", "mlp.up_proj", mlp.size, hidden, mlp.bias)
    linear("down", "mlp.down_proj", hidden, mlp.size, mlp.bias)
    return tuple(weights)

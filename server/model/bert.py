"""The encoders that BERT began: learned positions, post-norm layers with biases, plain MLPs, every token seen by all.

BERT, RoBERTa, XLM-RoBERTa and DistilBERT differ in names, and in the row of the first position. What a checkpoint
holds beyond the layers (the pooler of BERT's pre-training, a table 0, 1, 2, ...) is not needed for embedding. How
vectors are pooled is not in `config.json`: `pooling.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from millrace.server.model.activation import read_activation
from millrace.server.model.fields import Fields
from millrace.server.model.rotary import MAX_CONTEXT
from millrace.server.model.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    Weight,
)

IGNORED = (".position_ids", "pooler.dense.weight", "pooler.dense.bias")
PUBLISHED_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class Names:
    """How the config calls its numbers, and the checkpoint its modules: of a layer by role, under `layers`."""

    hidden: str
    mlp: str
    count: str
    heads: str
    activation: str
    layers: str
    modules: Mapping[str, str]


BERT = Names(
    hidden="hidden_size",
    mlp="intermediate_size",
    count="num_hidden_layers",
    heads="num_attention_heads",
    activation="hidden_act",
    layers="encoder.layer",
    modules={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
)
DISTILBERT = Names(
    hidden="dim",
    mlp="hidden_dim",
    count="n_layers",
    heads="n_heads",
    activation="activation",
    layers="transformer.layer",
    modules={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
)


def bert(config: Fields, architecture: str) -> ModelSpec:
    types = config.integer("type_vocab_size", 1, 1 << 16, 2)
    eps = config.number("layer_norm_eps", 0, 1, PUBLISHED_EPS)
    return _encoder_spec(config, architecture, BERT, eps=eps, token_types=types)


def roberta(config: Fields, architecture: str) -> ModelSpec:
    """The rows of the position table up to that of the padding token's id belong to no position."""
    types = config.integer("type_vocab_size", 1, 1 << 16, 2)
    eps = config.number("layer_norm_eps", 0, 1, PUBLISHED_EPS)
    offset = config.integer("pad_token_id", 0, MAX_CONTEXT, 1) + 1
    return _encoder_spec(config, architecture, BERT, eps=eps, token_types=types, position_offset=offset)


def distilbert(config: Fields, architecture: str) -> ModelSpec:
    """No token types; the epsilon of its norms is no setting."""
    return _encoder_spec(config, architecture, DISTILBERT, eps=PUBLISHED_EPS)


def _encoder_spec(
    config: Fields,
    architecture: str,
    names: Names,
    *,
    eps: float,
    token_types: int = 0,
    position_offset: int = 0,
) -> ModelSpec:
    """CheckpointError for what would be computed wrongly: relative positions, a BERT that decodes."""
    positions_kind = config.string("position_embedding_type", "absolute")
    if positions_kind != "absolute":
        raise config.error("position_embedding_type", f"is {positions_kind!r}; supported is absolute")
    for name in ("is_decoder", "add_cross_attention"):
        if config.flag(name, False):
            raise config.error(name, "is set: this encoder was trained to decode, which is not supported")
    hidden, heads = config.integer(names.hidden, 1, 1 << 17), config.integer(names.heads, 1, 4096)
    if hidden % heads:
        raise config.error(names.hidden, f"({hidden}) must be a multiple of {names.heads} ({heads})")
    vocab = config.integer("vocab_size", 1, 1 << 24)
    positions = config.integer("max_position_embeddings", position_offset + 1, MAX_CONTEXT)
    norm, dim = NormSpec("layer", "post", eps), hidden // heads
    attention = AttentionSpec(heads, heads, dim, dim**-0.5, None, causal=False, qkv_bias=True, o_bias=True)
    size, activation = config.integer(names.mlp, 1, 1 << 20), read_activation(config, names.activation, "gelu")
    mlp = MLPSpec("plain", size, activation, bias=True)
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        # All of the table. The `max_seq_length` of a sentence-transformers directory is only where its training cut
        # texts off; chunks as long as the table are embedded whole, or their ends could never be found.
        context=positions - position_offset,
        layers=tuple(
            LayerSpec(norm, attention, mlp, _layer_weights(f"{names.layers}.{index}", names.modules, hidden, size))
            for index in range(config.integer(names.count, 1, 1024))
        ),
        final_norm=None,
        tied=False,
        weights=_outer_weights(hidden, vocab, positions, token_types),
        embedding=EmbeddingSpec(positions, position_offset, token_types, norm),
        ignored=IGNORED,
    )


def _outer_weights(hidden: int, vocab: int, positions: int, token_types: int) -> tuple[Weight, ...]:
    tables = [("embedding", "word", vocab), ("position_embedding", "position", positions)]
    if token_types:
        tables.append(("token_type_embedding", "token_type", token_types))
    return (
        *(Weight(role, f"embeddings.{name}_embeddings.weight", (rows, hidden)) for role, name, rows in tables),
        Weight("embedding_norm", "embeddings.LayerNorm.weight", (hidden,)),
        Weight("embedding_norm_bias", "embeddings.LayerNorm.bias", (hidden,)),
    )


def _layer_weights(prefix: str, modules: Mapping[str, str], hidden: int, mlp: int) -> tuple[Weight, ...]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(modules, (hidden, hidden))
    shapes |= {"up": (mlp, hidden), "down": (hidden, mlp), "attention_norm": (hidden,), "mlp_norm": (hidden,)}
    return tuple(
        weight
        for role, module in modules.items()
        for weight in (
            Weight(role, f"{prefix}.{module}.weight", shapes[role]),
            Weight(f"{role}_bias", f"{prefix}.{module}.bias", shapes[role][:1]),
        )
    )

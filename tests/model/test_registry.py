"""From `config.json` to a spec: the rules of each architecture, the old and the new style of writing them."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from millrace.server.model.fields import Fields
from millrace.server.model.registry import model_spec
from millrace.server.model.rotary import frequencies
from millrace.server.model.spec import ModelSpec

BASE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def spec(architecture: str = "Llama", **changes: Any) -> ModelSpec:
    values = BASE | {"architectures": [f"{architecture}ForCausalLM"]} | changes
    return model_spec(Fields({name: value for name, value in values.items() if value is not ...}, "config.json"))


def windows(model: ModelSpec) -> list[int | None]:
    return [layer.attention.window for layer in model.layers]


def test_llama_3_2_1b() -> None:
    """Counts of the published model: 1,235,814,400 parameters, 32 KiB of bf16 keys and values a token."""
    model = spec(rope_theta=500000.0, rope_scaling=LLAMA3, tie_word_embeddings=True, head_dim=64)
    assert model.parameters == 1_235_814_400
    assert model.kv_floats_per_token * 2 == 32 * 1024
    assert model.context == 131072


def test_qwen3_0_6b() -> None:
    """596,049,920 parameters, with heads wider than hidden / heads."""
    model = spec(
        "Qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    assert model.parameters == 596_049_920


def test_old_and_new_rotary_styles_agree() -> None:
    old = spec(rope_theta=500000.0, rope_scaling=LLAMA3)
    assert spec(rope_parameters=LLAMA3 | {"rope_theta": 500000.0}) == old
    renamed = {"type" if name == "rope_type" else name: value for name, value in LLAMA3.items()}
    assert spec(rope_theta=500000, rope_scaling=renamed) == old
    assert spec(rope_theta=500000.0, rope_scaling=None) == spec(rope_parameters={"rope_theta": 500000.0}) != old


def test_defaults_of_missing_fields() -> None:
    attention = spec(num_key_value_heads=..., rms_norm_eps=...).layers[0].attention
    assert (attention.kv_heads, attention.head_dim, attention.position.theta) == (32, 64, 10_000.0)
    assert spec("Qwen3", hidden_size=1024).layers[0].attention.head_dim == 128
    assert spec("Mistral", num_key_value_heads=...).layers[0].attention.kv_heads == 8


def test_windows() -> None:
    assert windows(spec()) == [None] * 16
    assert windows(spec("Mistral", sliding_window=100)) == [100] * 16
    assert windows(spec("Mistral", sliding_window=None)) == [None] * 16
    assert windows(spec("Mistral")) == [4096] * 16
    qwen = {"sliding_window": 9, "max_window_layers": 10}
    for architecture in ("Qwen2", "Qwen3"):
        assert windows(spec(architecture, **qwen)) == [None] * 16
        assert windows(spec(architecture, use_sliding_window=True, **qwen)) == [None] * 10 + [9] * 6
        types = ["sliding_attention", "full_attention"] * 8
        assert windows(spec(architecture, use_sliding_window=True, layer_types=types, **qwen)) == [9, None] * 8
        assert windows(spec(architecture, layer_types=types, **qwen)) == [None] * 16


def test_biases_and_norms() -> None:
    def roles(model: ModelSpec) -> set[str]:
        return {weight.role for weight in model.layers[0].weights}

    plain = roles(spec())
    assert roles(spec(attention_bias=True)) - plain == {"q_bias", "k_bias", "v_bias", "o_bias"}
    assert roles(spec(mlp_bias=True)) - plain == {"gate_bias", "up_bias", "down_bias"}
    assert roles(spec("Qwen2")) - plain == {"q_bias", "k_bias", "v_bias"}
    assert roles(spec("Qwen3")) - plain == {"q_norm", "k_norm"}
    assert roles(spec("Mistral")) == plain


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 4096),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        (LLAMA3, 4096),
    ],
)
def test_context(scaling: dict[str, Any] | None, context: int) -> None:
    assert spec(max_position_embeddings=4096, rope_scaling=scaling).context == context


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [12, 64, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 131072},
        {"rope_type": "yarn", "original_max_position_embeddings": 32768, "attention_factor": 0.9},
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
            "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False,
        },
    ],
)  # fmt: skip
def test_frequencies_equal_those_of_transformers(theta: float, head_dim: int, scaling: dict[str, Any]) -> None:
    parameters = scaling | {"rope_theta": theta}
    ours, factor = frequencies(spec(head_dim=head_dim, rope_parameters=parameters).layers[0].attention.position)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LlamaConfig(**BASE | {"head_dim": head_dim, "rope_parameters": {"factor": None} | parameters})
        theirs, expected = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert math.isclose(factor, expected, rel_tol=1e-9)

"""Rotary positions: read from a `config.json`, and the one definition of their frequencies.

Configs come in the style of today (`rope_parameters`) and the older one (`rope_theta` beside `rope_scaling`).
"""

import math

import numpy as np
from numpy.typing import NDArray

from millrace.server.model.fields import Fields
from millrace.server.model.spec import LinearScaling, Llama3Scaling, RotaryScaling, RotarySpec, YarnScaling

Float64 = NDArray[np.float64]

MAX_CONTEXT = 1 << 24
SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn")


def rotary_spec(config: Fields, dim: int) -> RotarySpec:
    """Positions of heads of `dim`. CheckpointError for a kind of scaling that is not supported."""
    section = _section(config)
    theta = section if "rope_theta" in section else config
    for origin in (section, config):
        if origin.number("partial_rotary_factor", 0, 1, 1.0) != 1:
            raise origin.error("partial_rotary_factor", "must be 1: this architecture rotates whole heads")
    return RotarySpec(dim, theta.number("rope_theta", 1.001, 1e12, 10_000.0), _scaling(config, section))


def context_of(config: Fields, rotary: RotarySpec) -> int:
    """Tokens that the positions are good for.

    Linear and YaRN configs may state the length before or after stretching; the public documentation of both
    asks for the one before, so it is stretched here. Dynamic scaling is plain rotary up to the stated length
    and rotates cached keys anew beyond it, which no KV cache can do: the context ends there.
    """
    stated = config.integer("max_position_embeddings", 1, MAX_CONTEXT)
    match rotary.scaling:
        case LinearScaling(factor):
            return min(int(stated * factor), MAX_CONTEXT)
        case YarnScaling() as scaling:
            return min(max(stated, int(scaling.original_context * scaling.factor)), MAX_CONTEXT)
        case _:
            return stated


def _section(config: Fields) -> Fields:
    section = config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    if any(isinstance(value, dict) for value in section.values.values()):
        raise config.error("rope_parameters", "differs between layer types, which is not supported")
    return section


def _scaling(config: Fields, section: Fields) -> RotaryScaling | None:
    kind = section.string("rope_type", section.string("type", "default"))
    if kind not in SUPPORTED:
        raise section.error("rope_type", f"is {kind!r}; supported are {', '.join(SUPPORTED)}")
    if kind in ("default", "dynamic"):
        return None
    context = config.integer("max_position_embeddings", 1, MAX_CONTEXT)
    original = section.integer("original_max_position_embeddings", 1, MAX_CONTEXT, context)
    if kind == "yarn":
        return _yarn_scaling(section, original, context)
    factor = section.number("factor", 1, 1e6)
    if kind == "linear":
        return LinearScaling(factor)
    low, high = section.number("low_freq_factor", 0, 1e6), section.number("high_freq_factor", 0, 1e6)
    if low >= high:
        raise section.error("low_freq_factor", f"({low:g}) must be less than high_freq_factor ({high:g})")
    return Llama3Scaling(factor, low, high, original)


def _yarn_scaling(section: Fields, original: int, context: int) -> YarnScaling:
    factor = section.number("factor", 1, 1e6, max(context / original, 1.0))

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    mscale, over = section.number("mscale", 0, 1e6, 0.0), section.number("mscale_all_dim", 0, 1e6, 0.0)
    attention = temperature(mscale) / temperature(over) if mscale and over else temperature(1.0)
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=section.number("beta_fast", 1e-6, 1e6, 32.0),
        beta_slow=section.number("beta_slow", 1e-6, 1e6, 1.0),
        attention_factor=section.number("attention_factor", 0, 1e3, attention),
        truncate=section.flag("truncate", True),
    )


def frequencies(rotary: RotarySpec) -> tuple[NDArray[np.float32], float]:
    """Return radians per position, float32 [dim / 2], and the factor that cosine and sine are multiplied by.

    Su et al. 2021, arXiv:2104.09864; the scalings are named in `spec.py`.
    """
    plain = rotary.theta ** -(np.arange(0, rotary.dim, 2, dtype=np.float64) / rotary.dim)
    match rotary.scaling:
        case None:
            return plain.astype(np.float32), 1.0
        case LinearScaling(factor):
            return (plain / factor).astype(np.float32), 1.0
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling).astype(np.float32), 1.0
        case YarnScaling() as scaling:
            return _yarn(plain, rotary, scaling).astype(np.float32), scaling.attention_factor


def _llama3(plain: Float64, scaling: Llama3Scaling) -> Float64:
    turns = scaling.original_context * plain / (2 * math.pi)  # of each wave over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(plain, plain / scaling.factor, kept)


def _yarn(plain: Float64, rotary: RotarySpec, scaling: YarnScaling) -> Float64:
    def dimension(turns: float) -> float:
        """Index of the wave that makes so many turns over the original context."""
        wavelength = scaling.original_context / (turns * 2 * math.pi)
        return rotary.dim * math.log(wavelength) / (2 * math.log(rotary.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    span = high - low if high != low else 0.001
    return _blend(plain, plain / scaling.factor, 1 - (np.arange(len(plain), dtype=np.float64) - low) / span)


def _blend(plain: Float64, scaled: Float64, kept: Float64) -> Float64:
    kept = np.clip(kept, 0, 1)
    return scaled * (1 - kept) + plain * kept

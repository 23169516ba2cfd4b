"""In which numbers the cpu executor holds weights and KV cache: what `--dtype`, `--quantization` and so on come to."""

from dataclasses import dataclass
from typing import Literal

from millrace.server.config import EngineConfig
from millrace.server.errors import ConfigError

Width = Literal["bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Packing:
    """`group`: inputs that share a scale, of int4; else 0."""

    width: Width
    group: int = 0

    def __str__(self) -> str:
        return f"{self.width}-g{self.group}" if self.group else self.width


BF16 = Packing("bf16")


@dataclass(frozen=True, slots=True)
class Precision:
    """`layers`: matrices of the layers; `head`: the head, and with it a tied embedding."""

    layers: Packing
    head: Packing
    kv: Literal["bf16", "int8"]

    def __str__(self) -> str:
        parts = [str(self.layers)]
        if self.head != self.layers:
            parts.append(f"head {self.head}")
        if self.kv != "bf16":
            parts.append(f"kv {self.kv}")
        return ", ".join(parts)


ENCODER_PRECISION = Precision(BF16, BF16, "bf16")


def make_precision(config: EngineConfig) -> Precision:
    """Raises ConfigError for settings that contradict each other."""
    if config.dtype == "float32":
        raise ConfigError("--dtype float32: the cpu executor computes in bfloat16; add --executor reference")
    if config.quantization_group is not None and "int4" not in (config.quantization, config.head_quantization):
        raise ConfigError("--quantization-group is of int4 weights only: add --quantization int4")
    layers = _packing(config.quantization, config.quantization_group)
    # Four bits cost the head more than they save: it decides every token, and is a fraction of the weights.
    head = Packing("int8") if layers.width == "int4" else layers
    if config.head_quantization != "auto":
        head = _packing(config.head_quantization, config.quantization_group)
    return Precision(layers, head, "int8" if config.kv_cache_dtype == "int8" else "bf16")


def _packing(quantization: str, group: int | None) -> Packing:
    match quantization:
        case "int8":
            return Packing("int8")
        case "int4":
            return Packing("int4", group or 128)
        case _:
            return BF16

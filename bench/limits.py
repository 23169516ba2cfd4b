"""The speeds that no engine can exceed on a machine, from its roof and the numbers of a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millrace.bench.roof import Roof
from millrace.bench.workload import Speeds, Workload
from millrace.server.model.spec import ModelSpec, Weight

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
# Bytes of a weight in the layers. int4: groups of 128, each with a 2-byte scale and a 4-bit zero.
LAYER_BYTES = {"float32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2.5 / 128}
HEAD_BYTES = LAYER_BYTES | {"int4": 1.0}  # four bits would cost the head too much accuracy
# What the products can be computed in: any that is at least as exact as the activations need.
ARITHMETICS = {
    "float32": ("fp32",),
    "bf16": ("bf16", "fp32"),
    "int8": ("int8", "bf16", "fp32"),
    "int4": ("int8", "bf16", "fp32"),
}
NO_RATES: Mapping[int, float] = {}
WIDTHS = tuple(LAYER_BYTES)


@dataclass(frozen=True, slots=True)
class Work:
    """What a model asks of a machine: weights that every token of a prompt meets, and those of the head."""

    layers: int
    head: int

    @classmethod
    def of(cls, spec: ModelSpec) -> "Work":
        matrices = [weight for layer in spec.layers for weight in layer.weights if weight.role in MATRICES]
        return cls(sum(map(size, matrices)), spec.vocab_size * spec.hidden_size)

    def step_bytes(self, width: str) -> float:
        """Of weights, read in a step that decodes."""
        return self.layers * LAYER_BYTES[width] + self.head * HEAD_BYTES[width]


def size(weight: Weight) -> int:
    return math.prod(weight.shape)


def limits(
    work: Work, roof: Roof, width: str, isas: Sequence[str], workload: Workload, dram: Mapping[int, float] = NO_RATES
) -> Speeds:
    """`dram`: bytes per second at which memory gave the weights beside a batch; where it is not there, the roof's.

    Norms, attention and the KV cache taken as free, and everything else as perfectly overlapped.

    Prefill: two operations for each weight but those of the head, which one row of a prompt needs. Decode: each step
    reads the weights once, and each of its rows takes two operations for each of them, whichever takes longer.
    """
    compute = roof.compute(ARITHMETICS[width], isas)
    if not compute:
        return Speeds()
    prefill = compute / (2 * work.layers)

    def decode(batch: int) -> float:
        rate = dram.get(batch, roof.dram.all)
        return min(rate / work.step_bytes(width) * batch, compute / (2 * (work.layers + work.head)))

    prompts, outputs = workload.requests * workload.request_prompt, workload.requests * workload.request_output
    seconds = prompts / prefill + outputs / decode(workload.requests)
    return Speeds(prefill, {batch: decode(batch) for batch in workload.batches}, outputs / seconds)

"""The network of a `ModelSpec` in float32 PyTorch over a paged KV cache: the definition of every executor.

A token's result must not depend on what else is in the step: attention runs row by row over the row's own
keys and values, in parts of `SPAN` positions that begin at multiples of it, and matrices are multiplied with
at least `MIN_ROWS` rows, because the BLAS takes other kernels, with other roundings, for fewer. An encoder runs text by
text, each in memory of its own: then nothing else can matter.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.server.model.executors.base import Batch, Float32, KVLayout
from millrace.server.model.executors.plan import MAX_SCORES
from millrace.server.model.rotary import frequencies
from millrace.server.model.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RotarySpec, Weight

MIN_ROWS, SPAN = 8, 128

# Written out where PyTorch's fused forms round the last elements of an array differently from the rest.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": F.relu,
}
Roles = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class View:
    """What tokens begin:end of the step may see: a row of the batch, or a piece of a long one."""

    begin: int
    end: int
    slots: Tensor  # int64 [keys], where the keys and values lie
    hidden: Tensor  # bool [tokens, keys], what a token must not see


@dataclass(frozen=True, slots=True)
class Step:
    """What all causal layers share."""

    slots: Tensor  # int64 [tokens], where keys and values of the step go
    turns: Mapping[RotarySpec, tuple[Tensor, Tensor]]  # cosine and sine, [tokens, 1, dim / 2]
    views: Mapping[int | None, list[View]]  # by window


class ReferenceModel:
    """Weights and KV cache. `progress` counts layers completed."""

    def __init__(self, spec: ModelSpec, weights: Iterable[tuple[Weight, Float32]], layout: KVLayout):
        self.spec, self.progress, self.block_size = spec, 0, layout.block_size
        arrays = {weight.name: torch.from_numpy(values) for weight, values in weights}
        self.outer = {weight.role: arrays[weight.name] for weight in spec.weights}
        self.layers = [{weight.role: arrays[weight.name] for weight in layer.weights} for layer in spec.layers]
        slots = layout.num_blocks * layout.block_size
        # Each layer: keys and values [2, slots, kv heads, head dim]. NumPy's zeros take no memory until written.
        self.cache = [
            torch.from_numpy(np.zeros((2, slots, layer.attention.kv_heads, layer.attention.head_dim), np.float32))
            for layer in spec.layers
        ]
        rotaries = (layer.attention.position for layer in spec.layers)
        self.frequencies = {rotary: frequencies(rotary) for rotary in rotaries if rotary is not None}

    def forward(self, batch: Batch, token_ids: Tensor) -> Tensor:
        """Run all layers, store keys and values, and return float32 [tokens, hidden] before the final norm."""
        x = self._embed(batch, token_ids)
        if self.spec.causal:
            return self._run_layers(x, self._plan(batch))
        for begin, end in pairwise(batch.offsets.tolist()):
            x[begin:end] = self._run_layers(x[begin:end].clone(), None)
        return x

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm, where there is one."""
        return hidden if self.spec.final_norm is None else norm(hidden, self.outer, "final_norm", self.spec.final_norm)

    def pool(self, hidden: Tensor) -> Tensor:
        """The vector of a row, float32 [hidden], of its hidden states before the final norm [tokens, hidden]."""
        pooling = self.spec.pooling
        if pooling is None:
            return self.finish(hidden[-1:])[0]
        hidden = self.finish(hidden)
        vector = hidden[0] if pooling.kind == "cls" else hidden.mean(0)
        return F.normalize(vector, dim=0) if pooling.normalize else vector.clone()

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocabulary] of hidden states before the final norm."""
        head = self.outer["embedding" if self.spec.tied else "head"]
        return linear(self.finish(hidden), head)

    def release(self) -> None:
        """Free weights and cache; nothing runs after."""
        self.outer, self.layers, self.cache = {}, [], []

    def _embed(self, batch: Batch, token_ids: Tensor) -> Tensor:
        """What goes into the first layer: float32 [tokens, hidden]."""
        spec, tables = self.spec.embedding, self.outer
        x = F.embedding(token_ids, tables["embedding"])
        for index, vector in batch.embeddings.items():
            x[index] = torch.from_numpy(vector)
        if spec.token_types:
            x = x + tables["token_type_embedding"][0]
        if spec.positions:
            rows = torch.from_numpy(batch.positions).long() + spec.position_offset
            x = x + F.embedding(rows, tables["position_embedding"])
        return x if spec.norm is None else norm(x, tables, "embedding_norm", spec.norm)

    def _run_layers(self, x: Tensor, step: Step | None) -> Tensor:
        """`step` None: `x` is one whole text."""
        for layer, weights, cache in zip(self.spec.layers, self.layers, self.cache, strict=True):
            x = run_layer(layer, weights, cache, x, step)
            self.progress += 1
        return x

    def _plan(self, batch: Batch) -> Step:
        positions = torch.from_numpy(batch.positions).float()
        turns = {}
        for rotary, (radians, scale) in self.frequencies.items():
            angles = (positions[:, None] * torch.from_numpy(radians))[:, None]
            turns[rotary] = (angles.cos() * scale, angles.sin() * scale)
        windows = {layer.attention.window for layer in self.spec.layers}
        pieces = [piece for row in range(len(batch.outputs)) for piece in self._pieces(batch, row)]
        views = {window: [view(batch, *piece, window, self.block_size) for piece in pieces] for window in windows}
        return Step(torch.from_numpy(batch.slots).long(), turns, views)

    def _pieces(self, batch: Batch, row: int) -> Iterable[tuple[int, int, int]]:
        """Cut the tokens of a row so that the scores of a piece stay within MAX_SCORES: row, begin, end."""
        begin, end = int(batch.offsets[row]), int(batch.offsets[row + 1])
        heads = max(layer.attention.heads for layer in self.spec.layers)
        step = max(MAX_SCORES // (heads * int(batch.context_lens[row])), 1)
        return ((row, start, min(start + step, end)) for start in range(begin, end, step))


def view(batch: Batch, row: int, begin: int, end: int, window: int | None, block_size: int) -> View:
    """The keys begin and end at multiples of SPAN, hidden ones standing in for those that are not there."""
    positions = batch.positions[begin:end, None]
    first = 0 if window is None else max(int(positions[0, 0]) - window + 1, 0)
    context = int(positions[-1, 0]) + 1
    keys = np.arange(first // SPAN * SPAN, -(-context // SPAN) * SPAN)
    hidden = (keys > positions) | (keys < (first if window is None else positions - window + 1))
    own = np.where((keys < first) | (keys >= context), context - 1, keys)
    slots = batch.block_tables[row, own // block_size].astype(np.int64) * block_size + own % block_size
    return View(begin, end, torch.from_numpy(slots), torch.from_numpy(hidden))


def run_layer(layer: LayerSpec, weights: Roles, cache: Tensor, x: Tensor, step: Step | None) -> Tensor:
    """Attention, then MLP, each added to its input, with a norm before it or of the sum: float32 [tokens, hidden]."""

    def attend_all(y: Tensor) -> Tensor:
        return attention(layer.attention, layer.norm, weights, cache, y, step)

    if layer.norm.place == "pre":
        x = x + attend_all(norm(x, weights, "attention_norm", layer.norm))
        return x + mlp(layer.mlp, weights, norm(x, weights, "mlp_norm", layer.norm))
    x = norm(x + attend_all(x), weights, "attention_norm", layer.norm)
    return norm(x + mlp(layer.mlp, weights, x), weights, "mlp_norm", layer.norm)


def norm(x: Tensor, weights: Roles, role: str, spec: NormSpec) -> Tensor:
    if spec.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weights[role], weights[f"{role}_bias"], spec.eps)
    return rms_norm(x, weights[role], spec)


def rms_norm(x: Tensor, weight: Tensor, spec: NormSpec) -> Tensor:
    """Zhang and Sennrich 2019, arXiv:1910.07467, over the last dimension."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] times weight [out, in] transposed."""
    return F.linear(pad_rows(x), weight, bias)[: len(x)]


def pad_rows(x: Tensor) -> Tensor:
    """Add rows of zeros to [..., rows, columns] where there are fewer than MIN_ROWS."""
    return F.pad(x, (0, 0, 0, max(MIN_ROWS - x.shape[-2], 0)))


def attention(
    spec: AttentionSpec, qk_norm: NormSpec, weights: Roles, cache: Tensor, x: Tensor, step: Step | None
) -> Tensor:
    """Let each token of `x` see what it may: [tokens, hidden]."""

    def heads(role: str, count: int) -> Tensor:
        y = linear(x, weights[role], weights.get(f"{role}_bias")).view(-1, count, spec.head_dim)
        return norm(y, weights, f"{role}_norm", qk_norm) if f"{role}_norm" in weights else y

    q, k, v = heads("q", spec.heads), heads("k", spec.kv_heads), heads("v", spec.kv_heads)
    out = see_all(spec, q, k, v) if step is None else see_past(spec, q, k, v, cache, step)
    return linear(out, weights["o"], weights.get("o_bias"))


def see_all(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token of a text sees every other. All [tokens, heads, dim] -> [tokens, heads x dim]."""
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=spec.scale, enable_gqa=True
    )
    return mixed[0].transpose(0, 1).reshape(len(q), -1)


def see_past(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, step: Step) -> Tensor:
    """Store the keys and values of the step; each token sees itself and what came before: [tokens, heads x dim]."""
    if spec.position is not None:
        turns = step.turns[spec.position]
        q, k = rotate(q, *turns), rotate(k, *turns)
    cache[0, step.slots], cache[1, step.slots] = k, v
    out = torch.empty(len(q), spec.heads * spec.head_dim)
    for seen in step.views[spec.window]:
        keys, values = cache[:, seen.slots]
        out[seen.begin : seen.end] = attend(spec, q[seen.begin : seen.end], keys, values, seen.hidden)
    return out


def attend(spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Grouped-query attention of one row.

    q [n, heads, dim], keys and values [m, kv heads, dim], hidden [n, m] -> [n, heads x dim].
    """
    n, groups, spans = len(q), spec.heads // spec.kv_heads, len(keys) // SPAN
    q = q.view(n, spec.kv_heads, groups, -1).permute(1, 2, 0, 3).reshape(spec.kv_heads, groups * n, -1)
    scores = pad_rows(q) @ keys.permute(1, 2, 0) * spec.scale
    scores[:, : groups * n].masked_fill_(hidden.repeat(groups, 1), -torch.inf)
    parts = scores.softmax(-1).view(spec.kv_heads, -1, spans, SPAN).transpose(1, 2)
    mixed = torch.matmul(parts, values.view(spans, SPAN, spec.kv_heads, -1).permute(2, 0, 1, 3))
    mixed = reduce(torch.add, mixed.unbind(1))  # in order, which `sum` does not promise
    return mixed[:, : groups * n].reshape(spec.heads, n, -1).transpose(0, 1).reshape(n, -1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn [tokens, heads, dim]: element i of the first half with element i of the second."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def mlp(spec: MLPSpec, weights: Roles, x: Tensor) -> Tensor:
    activate, up = ACTIVATIONS[spec.activation], linear(x, weights["up"], weights.get("up_bias"))
    if spec.kind == "plain":
        return linear(activate(up), weights["down"], weights.get("down_bias"))
    gate = activate(linear(x, weights["gate"], weights.get("gate_bias")))
    return linear(gate * up, weights["down"], weights.get("down_bias"))

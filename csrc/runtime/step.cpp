#include "runtime/step.h"

#include <algorithm>

namespace millrace {
namespace {

std::size_t widest_row(const Network& network) {
  std::size_t widest = 0;
  for (const Layer& layer : network.layers) {
    for (const PackedMatrix* matrix : {&layer.qkv.weight, &layer.o.weight, &layer.up.weight, &layer.down.weight}) {
      widest = std::max(widest, activation_row_bytes(matrix->width, matrix->k));
    }
  }
  if (network.head.data != nullptr) widest = std::max(widest, activation_row_bytes(network.head.width, network.hidden));
  return widest;
}

std::int32_t most_groups(const Network& network) {
  std::int32_t most = 1;
  for (const Layer& layer : network.layers) {
    for (const PackedMatrix* matrix : {&layer.qkv.weight, &layer.o.weight, &layer.up.weight, &layer.down.weight}) {
      most = std::max(most, activation_groups(matrix->width, matrix->k, matrix->group));
    }
  }
  const PackedMatrix& head = network.head;
  return head.data == nullptr ? most : std::max(most, activation_groups(head.width, head.k, head.group));
}

}  // namespace

Scratch::Scratch(const Network& network, std::int32_t tokens_, std::int32_t draws_, std::int32_t threads)
    : tokens(tokens_), draws(draws_) {
  std::int32_t qkv_size = 0, q_size = 0, mlp_size = 0, kv_heads = 0, head_dim = 2;
  for (const Layer& layer : network.layers) {
    qkv_size = std::max(qkv_size, layer.qkv_size());
    q_size = std::max(q_size, layer.q_size());
    mlp_size = std::max(mlp_size, layer.mlp_size);
    kv_heads = std::max(kv_heads, layer.kv_heads);
    head_dim = std::max(head_dim, layer.head_dim);
  }
  const auto rows = static_cast<std::size_t>(std::max(tokens, draws));
  const auto hidden_size = static_cast<std::size_t>(network.hidden);
  const std::size_t row_bytes = widest_row(network), groups = static_cast<std::size_t>(most_groups(network));
  half_stride = static_cast<std::int64_t>(activation_row_bytes(Width::bf16, mlp_size) / sizeof(std::uint16_t));
  row_size = std::max({network.hidden, q_size, head_dim});
  std::size_t turned = 0;
  for (const Rotary& rotary : network.rotaries) turned += static_cast<std::size_t>(rotary.dim);
  // An encoder's texts are whole, each in blocks of its own: at most one block per text is not full.
  const std::size_t text_blocks = network.causal() ? 0 : rows / kBlockTokens + rows;
  const std::size_t text_bytes = text_blocks * kv_block_bytes(KVType::bf16, kv_heads, head_dim);
  const std::size_t floats = rows * (2 * hidden_size + static_cast<std::size_t>(qkv_size + q_size) + 1 + turned) +
                             static_cast<std::size_t>(threads) * static_cast<std::size_t>(row_size) +
                             static_cast<std::size_t>(draws) * static_cast<std::size_t>(network.vocab);
  const std::size_t bytes = (floats + rows * groups) * sizeof(float) +
                            rows * (static_cast<std::size_t>(half_stride) * sizeof(std::uint16_t) + row_bytes) +
                            2 * text_bytes + (32 + network.rotaries.size()) * Arena::kAlignment;
  arena = std::make_unique<Arena>(bytes);
  hidden = arena->array<float>(rows * hidden_size);
  qkv = arena->array<float>(rows * static_cast<std::size_t>(qkv_size));
  mixed = arena->array<float>(rows * static_cast<std::size_t>(q_size));
  half = arena->array<std::uint16_t>(rows * static_cast<std::size_t>(half_stride));
  activations = arena->array<std::byte>(rows * row_bytes);
  activation_scales = arena->array<float>(rows);
  activation_sums = arena->array<std::int32_t>(rows * groups);
  for (const Rotary& rotary : network.rotaries) {
    turns.push_back(arena->array<float>(rows * static_cast<std::size_t>(rotary.dim)));
  }
  row_space = arena->array<float>(static_cast<std::size_t>(threads) * static_cast<std::size_t>(row_size));
  logits = arena->array<float>(static_cast<std::size_t>(draws) * static_cast<std::size_t>(network.vocab));
  pooled = arena->array<float>(rows * hidden_size);
  if (text_blocks > 0) {
    texts = {KVType::bf16, static_cast<std::int32_t>(text_blocks), kv_heads,
             head_dim,     arena->array<std::byte>(text_bytes),    arena->array<std::byte>(text_bytes),
             nullptr};
  }
}

}  // namespace millrace

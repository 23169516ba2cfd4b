#include "runtime/forward.h"

#include <algorithm>

#include "millrace/rows.h"
#include "runtime/weights.h"

namespace millrace {
namespace {

// Pieces of a matrix that each thread gets: enough to even out threads of unequal speed, each a long read.
constexpr std::int64_t kPiecesPerThread = 8;

bool same_attention(const Layer& a, const Layer& b) {
  return a.heads == b.heads && a.kv_heads == b.kv_heads && a.head_dim == b.head_dim && a.causal == b.causal &&
         a.window == b.window;
}

MatmulOutput to_floats(Epilogue epilogue, const Linear& linear, float* out, std::int64_t stride) {
  return {epilogue, Activation::none, linear.bias, out, nullptr, stride};
}

}  // namespace

std::size_t plan_index(const Network& network, std::size_t layer) {
  std::size_t index = 0;
  while (!same_attention(network.layers[index], network.layers[layer])) ++index;
  return index;
}

AttentionInput attention_input(const Network& network, const Layer& layer, const KVCache& cache, const StepInput& input,
                               const Scratch& scratch) {
  const bool paged = network.causal();
  return {cache,
          layer.heads,
          layer.scale,
          layer.causal,
          layer.window,
          input.rows,
          input.offsets,
          input.context_lens,
          paged ? input.block_tables : scratch.text_tables.data(),
          paged ? input.table_stride : scratch.text_stride,
          scratch.qkv,
          layer.qkv_size(),
          scratch.mixed,
          layer.q_size()};
}

Forward::Forward(const Network& network, KVStore& kv, Pool& pool, Isa isa, const StepInput& input, Scratch& scratch,
                 int thread)
    : n_(network), kv_(kv), pool_(pool), isa_(isa), in_(input), s_(scratch), thread_(thread) {}

template <class Fn>
void Forward::each_row(std::int32_t rows, Fn&& fn) {
  const std::int64_t grain = std::max<std::int64_t>(1, rows / (kPiecesPerThread * pool_.size()));
  pool_.share(thread_, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (auto row = static_cast<std::int32_t>(begin); row < end; ++row) fn(row);
  });
}

void Forward::run(std::atomic<std::int64_t>& progress) {
  embed();
  for (std::size_t index = 0; index < n_.layers.size(); ++index) {
    const Layer& layer = n_.layers[index];
    attention(index);
    mlp(layer);
    if (thread_ == 0) progress.fetch_add(1, std::memory_order_relaxed);
  }
  const Layer& last = n_.layers.back();
  if (last.post_norm) {
    each_row(in_.tokens,
             [&](std::int32_t token) { normalise(last.mlp_norm, hidden_row(token), n_.hidden, hidden_row(token)); });
  }
}

void Forward::embed() {
  each_row(in_.tokens, [&](std::int32_t token) {
    embed_token(token);
    for (std::size_t i = 0; i < n_.rotaries.size(); ++i) {
      const Rotary& rotary = n_.rotaries[i];
      float* cosine = s_.turns[i] + std::int64_t{token} * rotary.dim;
      rotary_turns(in_.positions[token], rotary.frequencies, rotary.factor, rotary.dim / 2, cosine,
                   cosine + rotary.dim / 2);
    }
  });
}

void Forward::embed_token(std::int32_t token) {
  float* row = hidden_row(token);
  const auto add = [&](const Table& table, std::int32_t index, bool accumulate) {
    const std::size_t bytes = stored_bytes(table.stored) * static_cast<std::size_t>(n_.hidden);
    embed_row(table.data + static_cast<std::size_t>(index) * bytes, table.stored, n_.hidden, accumulate, row, isa_);
  };
  const float* given = nullptr;
  for (std::int32_t i = 0; i < in_.embedded; ++i) {
    if (in_.embedded_tokens[i] == token) given = in_.embeddings + std::int64_t{i} * n_.hidden;
  }
  if (given != nullptr) {
    std::copy_n(given, n_.hidden, row);
  } else if (n_.embedding.data == nullptr) {
    unpack_channel(n_.head, in_.token_ids[token], row, isa_);
  } else {
    add(n_.embedding, in_.token_ids[token], false);
  }
  if (n_.token_types.data != nullptr) add(n_.token_types, 0, true);
  if (n_.positions.data != nullptr) add(n_.positions, in_.positions[token] + n_.position_offset, true);
  if (n_.embedding_norm.weight != nullptr) normalise(n_.embedding_norm, row, n_.hidden, row);
}

void Forward::attention(std::size_t index) {
  const Layer& layer = n_.layers[index];
  const KVCache& cache = n_.causal() ? kv_.layer(index) : s_.texts;
  if (!layer.post_norm) {
    encode_hidden(layer.attention_norm, false, layer.qkv.weight);
  } else {
    encode_hidden(index > 0 ? n_.layers[index - 1].mlp_norm : Norm{}, true, layer.qkv.weight);
  }
  multiply(layer.qkv, activations(layer.qkv.weight, in_.tokens),
           to_floats(Epilogue::store, layer.qkv, s_.qkv, layer.qkv_size()));
  each_row(in_.tokens, [&](std::int32_t token) { rotate_and_store(layer, cache, token); });
  const AttentionInput attend_to = attention_input(n_, layer, cache, in_, s_);
  const AttentionPlan& plan = s_.plans[plan_index(n_, index)];
  pool_.share(thread_, plan.items(), 1, [&](std::int64_t begin, std::int64_t end) {
    attend(attend_to, plan, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end), thread_, isa_);
  });
  if (plan.merges() > 0) {
    pool_.share(thread_, plan.merges(), 1, [&](std::int64_t begin, std::int64_t end) {
      merge(attend_to, plan, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end), isa_);
    });
  }
  const Activations mixed = activations(layer.o.weight, in_.tokens);
  each_row(in_.tokens, [&](std::int32_t token) {
    encode_row(mixed, token, s_.mixed + std::int64_t{token} * layer.q_size(), isa_);
  });
  multiply(layer.o, mixed, to_floats(Epilogue::add, layer.o, s_.hidden, n_.hidden));
}

void Forward::rotate_and_store(const Layer& layer, const KVCache& cache, std::int32_t token) {
  float* q = s_.qkv + std::int64_t{token} * layer.qkv_size();
  float* k = q + layer.q_size();
  const float* v = k + layer.kv_size();
  const auto normalise_heads = [&](const Norm& norm, float* x, std::int32_t heads) {
    if (norm.weight == nullptr) return;
    for (std::int32_t head = 0; head < heads; ++head) {
      normalise(norm, x + head * layer.head_dim, layer.head_dim, x + head * layer.head_dim);
    }
  };
  normalise_heads(layer.q_norm, q, layer.heads);
  normalise_heads(layer.k_norm, k, layer.kv_heads);
  if (layer.rotary >= 0) {
    const float* cosine = s_.turns[static_cast<std::size_t>(layer.rotary)] + std::int64_t{token} * layer.head_dim;
    rotate(q, layer.heads + layer.kv_heads, layer.head_dim, cosine, cosine + layer.head_dim / 2, isa_);
  }
  write_kv(cache, n_.causal() ? in_.slots[token] : s_.text_slots[static_cast<std::size_t>(token)], k, v, isa_);
}

void Forward::mlp(const Layer& layer) {
  encode_hidden(layer.post_norm ? layer.attention_norm : layer.mlp_norm, layer.post_norm, layer.up.weight);
  multiply(layer.up, activations(layer.up.weight, in_.tokens),
           {layer.gated ? Epilogue::gate : Epilogue::activate, layer.activation, layer.up.bias, nullptr, s_.half,
            s_.half_stride});
  Activations down = activations(layer.down.weight, in_.tokens);
  if (down.width == Width::bf16) {
    down.data = reinterpret_cast<std::byte*>(s_.half);
    down.row_bytes = static_cast<std::size_t>(s_.half_stride) * sizeof(std::uint16_t);
  } else {
    each_row(in_.tokens,
             [&](std::int32_t token) { encode_row_bf16(down, token, s_.half + token * s_.half_stride, isa_); });
  }
  multiply(layer.down, down, to_floats(Epilogue::add, layer.down, s_.hidden, n_.hidden));
}

void Forward::pool_rows() {
  each_row(in_.pooled, [&](std::int32_t index) {
    const std::int32_t row = in_.pooled_rows[index], begin = in_.offsets[row], end = in_.offsets[row + 1];
    float* out = s_.pooled + std::int64_t{index} * n_.hidden;
    if (n_.pooling == Pooling::mean) {
      if (n_.final_norm.weight != nullptr) {
        for (std::int32_t token = begin; token < end; ++token) {
          normalise(n_.final_norm, hidden_row(token), n_.hidden, hidden_row(token));
        }
      }
      mean_rows(hidden_row(begin), n_.hidden, end - begin, n_.hidden, out, isa_);
    } else {
      normalise(n_.final_norm, hidden_row(n_.pooling == Pooling::first ? begin : end - 1), n_.hidden, out);
    }
    if (n_.normalize) normalize(out, n_.hidden, isa_);
  });
}

void Forward::compute_logits() {
  const Activations x = activations(n_.head, in_.draws);
  each_row(in_.draws, [&](std::int32_t draw) {
    normalise(n_.final_norm, hidden_row(in_.draw_tokens[draw]), n_.hidden, row_space());
    encode_row(x, draw, row_space(), isa_);
  });
  multiply({n_.head, nullptr}, x, {Epilogue::store, Activation::none, nullptr, s_.logits, nullptr, n_.vocab});
}

Activations Forward::activations(const PackedMatrix& like, std::int32_t rows) const {
  return {
      like.width,           like.group,        rows, like.k, s_.activations, activation_row_bytes(like.width, like.k),
      s_.activation_scales, s_.activation_sums};
}

void Forward::encode_hidden(const Norm& norm, bool replace, const PackedMatrix& next) {
  const Activations x = activations(next, in_.tokens);
  each_row(in_.tokens, [&](std::int32_t token) {
    float* row = hidden_row(token);
    float* out = replace ? row : row_space();
    normalise(norm, row, n_.hidden, out);
    encode_row(x, token, out, isa_);
  });
}

void Forward::normalise(const Norm& norm, const float* x, std::int32_t size, float* out) const {
  if (norm.weight == nullptr) {
    if (out != x) std::copy_n(x, size, out);
  } else if (norm.layer) {
    layer_norm(x, norm.weight, norm.bias, norm.eps, size, out, isa_);
  } else {
    rms_norm(x, norm.weight, norm.eps, size, out, isa_);
  }
}

void Forward::multiply(const Linear& linear, const Activations& x, const MatmulOutput& output) {
  const std::int64_t count = blocks(linear.weight);
  const std::int64_t grain = std::max<std::int64_t>(1, count / (kPiecesPerThread * pool_.size()));
  pool_.share(thread_, count, grain, [&](std::int64_t begin, std::int64_t end) {
    matmul(linear.weight, x, output, 0, x.rows, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end), isa_);
  });
}

}  // namespace millrace

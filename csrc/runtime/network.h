// A model as the runtime computes it: plain data over memory that Weights owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "millrace/matmul.h"

namespace millrace {

// RMS norm, or layer norm with a bias. `weight` null: no norm.
struct Norm {
  bool layer = false;
  float eps = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
};

// Rows of `hidden` numbers as the checkpoint stores them. `data` null: no table.
struct Table {
  const std::byte* data = nullptr;
  Stored stored = Stored::float32;
  std::int32_t rows = 0;
};

// A linear map. `bias` null: none; in the order of packed channels.
struct Linear {
  PackedMatrix weight{};
  const float* bias = nullptr;
};

struct Rotary {
  std::int32_t dim = 0;
  float factor = 1;
  const float* frequencies = nullptr;  // [dim / 2] radians per position
};

struct Layer {
  bool post_norm = false;  // norms of the sums of what goes in and what comes out, instead of what goes in
  Norm attention_norm, mlp_norm;
  Norm q_norm, k_norm;  // of each head
  std::int32_t heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1;
  std::int32_t rotary = -1;  // index into Network::rotaries; -1: none
  bool causal = true;
  std::int32_t window = 0;  // 0: none
  Linear qkv;               // channels of q, then k, then v
  Linear o;
  bool gated = true;
  Activation activation = Activation::silu;
  std::int32_t mlp_size = 0;
  Linear up;  // gated: gates and ups in turns of 16, as Epilogue::gate wants them
  Linear down;

  std::int32_t q_size() const { return heads * head_dim; }
  std::int32_t kv_size() const { return kv_heads * head_dim; }
  std::int32_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

enum class Pooling { last, mean, first };

struct Network {
  std::int32_t vocab = 0, hidden = 0;
  Table embedding;  // null where tied: then a row is a channel of the head
  Table positions;
  std::int32_t position_offset = 0;
  Table token_types;
  Norm embedding_norm, final_norm;
  std::vector<Rotary> rotaries;
  std::vector<Layer> layers;
  PackedMatrix head{};  // null data for an encoder
  Pooling pooling = Pooling::last;
  bool normalize = false;  // pooled vectors to length 1

  bool causal() const {
    for (const Layer& layer : layers) {
      if (!layer.causal) return false;
    }
    return true;
  }
};

}  // namespace millrace

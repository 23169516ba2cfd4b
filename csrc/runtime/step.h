// One step of a model: what goes in, what comes out, and the memory in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "millrace/attention.h"
#include "millrace/matmul.h"
#include "runtime/arena.h"
#include "runtime/network.h"

namespace millrace {

// R rows of T tokens in all; row i owns tokens offsets[i] to offsets[i + 1]. The caller has checked every range.
struct StepInput {
  std::int32_t rows, tokens;
  const std::int32_t* token_ids;     // [T]
  const std::int32_t* positions;     // [T] index in the sequence
  const std::int32_t* slots;         // [T] block * kBlockTokens + offset; not read by encoders
  const std::int32_t* offsets;       // [R + 1]
  const std::int32_t* context_lens;  // [R]
  const std::int32_t* block_tables;  // [R][table_stride]; not read by encoders
  std::int64_t table_stride;
  std::int32_t draws;  // D tokens whose logits are wanted
  const std::int32_t* draw_tokens;
  std::int32_t pooled;  // P rows whose vector is wanted
  const std::int32_t* pooled_rows;
  std::int32_t embedded;  // E tokens that come as vectors instead of ids
  const std::int32_t* embedded_tokens;
  const float* embeddings;  // [E][hidden]
};

// Memory of steps of up to `tokens` tokens and `draws` draws. Everything that a step reads it has written before,
// but for the zeros that pad rows of activations.
struct Scratch {
  Scratch(const Network& network, std::int32_t tokens, std::int32_t draws, std::int32_t threads);

  std::int32_t tokens, draws;
  std::unique_ptr<Arena> arena;
  float* hidden;             // [T][hidden]: the residual stream
  float* qkv;                // [T][widest qkv]
  float* mixed;              // [T][widest q]: what attention yields
  std::uint16_t* half;       // [T][half_stride] bf16: between the halves of an MLP
  std::int64_t half_stride;  // numbers
  std::byte* activations;    // [T][widest row]: what matrices are multiplied with
  float* activation_scales;  // [T]
  std::int32_t* activation_sums;
  std::vector<float*> turns;  // of each rotary: cosines [T][dim / 2], then sines
  float* row_space;           // [threads][row_size]: a row in hand
  std::int64_t row_size;
  float* logits;  // [D][vocab]
  float* pooled;  // [T][hidden] at most one vector for each token
  // Encoders: one layer's keys and values of the texts of the step.
  KVCache texts{};
  std::vector<std::int32_t> text_slots;   // [T]
  std::vector<std::int32_t> text_tables;  // [R][text_stride]
  std::int64_t text_stride = 0;
  std::vector<AttentionPlan> plans;  // one for each kind of layer
};

}  // namespace millrace

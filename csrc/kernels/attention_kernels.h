// What attention has for each instruction set: attention_<isa>.cpp.
#pragma once

#include "millrace/attention.h"

namespace millrace {

// Queries of a tile: (token, head of the group) pairs of one row and KV head, numbered token * group + head.
inline constexpr std::int32_t kTileQueries = 48;
// Queries multiplied together, so that each load of keys or values serves them all.
inline constexpr std::int32_t kTogether = 6;

struct Range {
  std::int32_t begin, end;
};

// Spans of a tile of queries, for each of some KV heads.
inline constexpr std::int64_t kWhole = -1;
struct AttentionItem {
  std::int32_t row;
  Range heads;  // KV heads
  std::int32_t first_query, queries;
  Range spans;
  std::int64_t part;  // where [spans][queries][part_floats] go; kWhole: nothing is split, and the output is written
};

// The parts of a tile that was split by spans.
struct AttentionMerge {
  std::int32_t row, head;
  std::int32_t first_query, queries;
  std::int32_t spans;
  std::int64_t part;
};

// A part: values mixed, then its Softmax.
constexpr std::int32_t part_floats(std::int32_t head_dim) { return padded_dim(head_dim) + 2; }

// What was seen so far: the highest score (-infinity: nothing) and the sum of exponentials relative to it.
struct Softmax {
  float highest, sum;
};

// One per thread. What is multiplied lies in rows of kSpan, as float32 or bf16.
struct alignas(64) AttentionScratch {
  float queries[kTileQueries][kSpan];
  float mixed[kTileQueries][kSpan];
  Softmax state[kTileQueries];
  float scores[kTogether][kSpan];
  float weights[kTogether][kSpan];
  float part[kTogether][kSpan];
  std::uint32_t keys[kSpan * kMaxHeadDim / 2];
  std::uint32_t values[kSpan * kMaxHeadDim / 2];
};
static_assert(kMaxHeadDim <= kSpan);

struct AttentionKernels {
  void (*attend)(const AttentionInput&, const AttentionItem&, float* parts, AttentionScratch&);
  void (*merge)(const AttentionInput&, const AttentionMerge&, const float* parts);
};

extern const AttentionKernels attention_avx2, attention_avx512, attention_avx512_bf16;

// Positions that a token sees, `token` counting those of its row in this step.
[[gnu::always_inline]] inline Range visible(const AttentionInput& input, std::int32_t row, std::int32_t token) {
  const std::int32_t context = input.context_lens[row];
  const std::int32_t position = context - (input.offsets[row + 1] - input.offsets[row]) + token;
  const std::int32_t begin = input.window > 0 && position >= input.window ? position - input.window + 1 : 0;
  return {begin, input.causal ? position + 1 : context};
}

}  // namespace millrace

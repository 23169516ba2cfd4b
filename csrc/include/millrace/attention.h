// Attention over a paged KV cache, for prefill chunks and decodes in one step. kernels/reference/attention.py is the
// definition.
//
// Positions are cut into spans of kSpan at absolute multiples of it. Within a span: scores, their maximum,
// exponentials, their sum and the mixed values, all from nothing; spans are merged in ascending order (Dao 2022,
// arXiv:2205.14135, and "flash-decoding"). So a token's result depends on its own context only: not on the chunk it
// is computed in, on the other rows, nor on how many threads share the spans of a long one.
#pragma once

#include <cstdint>
#include <memory>

#include "millrace/isa.h"
#include "millrace/kv_cache.h"

namespace millrace {

inline constexpr std::int32_t kSpan = 256;

// Quantises or rounds keys and values of one token and stores them in slot block * 32 + offset.
// keys, values: float32 [kv_heads][head_dim] (keys already rotated).
// Different tokens may be written by different threads.
void write_kv(const KVCache& cache, std::int64_t slot, const float* keys, const float* values, Isa isa);

// R rows of one layer; row i owns tokens offsets[i] to offsets[i + 1].
struct AttentionInput {
  KVCache cache;
  std::int32_t heads;  // multiple of kv_heads
  float scale;
  bool causal;          // a token sees positions up to its own; else all of its row's context
  std::int32_t window;  // a token sees itself and window - 1 before it; 0: all
  std::int32_t rows;
  const std::int32_t* offsets;       // [rows + 1]
  const std::int32_t* context_lens;  // [rows]: tokens of the row in the cache; the last query is at context_len - 1
  const std::int32_t* block_tables;  // [rows][table_stride]
  std::int64_t table_stride;
  const float* q;  // [tokens][q_stride], heads * head_dim of them used, rotated
  std::int64_t q_stride;
  float* out;  // [tokens][out_stride], heads * head_dim of them written
  std::int64_t out_stride;
};

// The work of one layer, divided into items that threads share. Items of one row, KV head and tile of queries may be
// split by spans; then `merges` put the parts together. One plan serves every layer of equal heads, dim and window;
// it keeps its memory from step to step.
class AttentionPlan {
 public:
  AttentionPlan();
  ~AttentionPlan();
  AttentionPlan(AttentionPlan&&) noexcept;
  AttentionPlan& operator=(AttentionPlan&&) noexcept;

  void make(const AttentionInput& input, std::int32_t threads);  // threads: how many will share it
  std::int32_t items() const;
  std::int32_t merges() const;

  struct State;
  State& state() const { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

// Items [first, last); all items before any merge. Each thread gives a number below `threads` of its own.
void attend(const AttentionInput& input, const AttentionPlan& plan, std::int32_t first, std::int32_t last,
            std::int32_t thread, Isa isa);
void merge(const AttentionInput& input, const AttentionPlan& plan, std::int32_t first, std::int32_t last, Isa isa);

}  // namespace millrace

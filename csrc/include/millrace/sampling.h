// Choosing the next token of each row of logits. kernels/reference/sampling.py is the definition.
#pragma once

#include <cstdint>

#include "millrace/isa.h"

namespace millrace {

// S rows of V float32 logits and one column per parameter, S long each. Ragged columns give row i the
// entries offsets[i] to offsets[i + 1]. The caller has checked every range: kernels/sampling.py states them.
struct SamplingInput {
  const float* logits;
  std::int64_t row_stride;  // floats
  std::int32_t rows;
  std::int32_t vocab;
  const float* temperature;
  const float* top_p;
  const std::int32_t* top_k;
  const float* min_p;
  const float* presence_penalty;
  const float* frequency_penalty;
  const float* repetition_penalty;
  const std::uint64_t* seed;
  const std::int32_t* choice;
  const std::int32_t* position;
  const std::int32_t* top_n;
  const std::int32_t* bias_offsets;
  const std::int32_t* bias_ids;
  const float* bias_values;
  const std::int32_t* history_offsets;
  const std::int32_t* history_ids;
  const std::int32_t* history_prompt_lens;
  const std::uint32_t* const* masks;  // [S] of V bits in 32-bit words; null: every token is allowed
};

enum class SamplingStatus : std::int32_t { ok, not_finite, no_token };

// Row i writes min(max(top_n[i], 0), V) entries of top_* from i * top_width on, and none if its status is not ok.
struct SamplingOutput {
  std::int32_t* token_ids;  // [S] -1 unless ok
  float* logprobs;          // [S] NaN unless ok and top_n >= 0
  SamplingStatus* status;   // [S]
  std::int32_t top_width;
  std::int32_t* top_token_ids;  // [S, top_width]
  float* top_logprobs;          // [S, top_width]
};

// Rows first_row to last_row - 1. Reads only the logits of a row for that row: a row's result does not depend on the
// others, nor on `isa`, so threads may share the rows of one input and output.
void sample(const SamplingInput& input, const SamplingOutput& output, Isa isa, std::int32_t first_row,
            std::int32_t last_row);

}  // namespace millrace

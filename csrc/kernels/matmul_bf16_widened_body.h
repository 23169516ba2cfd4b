// Products of bf16 where the processor has none: both numbers of a pair are widened. simd_*.h is included before.
#pragma once

#include "matmul_bf16_body.h"

namespace millrace {
namespace {

template <int kMost, int kFew>
struct WidenedMultiply {
  static constexpr int kMostRows = kMost, kFewRows = kFew;

  template <int kRows, int kCount>
  static void add(const std::byte* weights, const std::byte* x, std::int64_t row_bytes, F32 (&sums)[kRows][kCount]) {
    F32 w[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) w[i] = lower(load_pairs(weights + vector_offset(i)));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F32 value = lower(fill_pairs(x + r * row_bytes));
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sums[r][i] = fma(value, w[i], sums[r][i]);
    }
    asm("" : "+r"(weights), "+r"(x));  // to load pairs again: kept since the lower halves they would fill the registers
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) w[i] = upper(load_pairs(weights + vector_offset(i)));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F32 value = upper(fill_pairs(x + r * row_bytes));
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sums[r][i] = fma(value, w[i], sums[r][i]);
    }
  }
};

}  // namespace
}  // namespace millrace

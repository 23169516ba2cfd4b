// Products of bf16 pairs for instruction sets without them: each half widened to float32, the even one first.
#pragma once

#include "attention_kernels.h"

namespace millrace {
namespace {

using Weight = float;

inline void store_weights(Weight* out, F32 x) { store(out, x); }
inline void store_rounded(Weight* out, F32 x) {  // to bf16
  std::uint16_t halves[kLanes];
  store_bf16(halves, x);
  store(out, load_bf16(halves));
}

// sums[r][c] += weights[r] . panels[c], R rows kSpan apart and C panels, `steps` pairs of each; asks for what is
// `after` them.
template <std::int32_t R, std::int32_t C>
[[gnu::always_inline]] inline void multiply(F32 (&sums)[R][C * kVectors], const Weight* weights,
                                            const std::uint32_t* const (&panels)[C],
                                            const std::uint32_t* const (&after)[C], std::int32_t steps) {
  for (std::int32_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C; ++c) prefetch(after[c] + s * 16);
    F32 columns[C * kVectors];
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C * kVectors; ++c)
      columns[c] = lower(load_pairs(panels[c / kVectors] + s * 16 + c % kVectors * kLanes));
#pragma GCC unroll 8
    for (std::int32_t r = 0; r < R; ++r) {
      const F32 weight = fill(weights[r * kSpan + 2 * s]);
#pragma GCC unroll 8
      for (std::int32_t c = 0; c < C * kVectors; ++c) sums[r][c] = fma(columns[c], weight, sums[r][c]);
    }
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C * kVectors; ++c)
      columns[c] = upper(load_pairs(panels[c / kVectors] + s * 16 + c % kVectors * kLanes));
#pragma GCC unroll 8
    for (std::int32_t r = 0; r < R; ++r) {
      const F32 weight = fill(weights[r * kSpan + 2 * s + 1]);
#pragma GCC unroll 8
      for (std::int32_t c = 0; c < C * kVectors; ++c) sums[r][c] = fma(columns[c], weight, sums[r][c]);
    }
  }
}

}  // namespace
}  // namespace millrace

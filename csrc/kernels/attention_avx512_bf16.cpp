#include "attention_kernels.h"
#include "simd_avx512.h"

namespace millrace {
namespace {

constexpr int kPanels = 4;  // of 16 columns, times kTogether: sums that fit the registers
constexpr int kVectors = 1;

using Weight = std::uint16_t;

inline void store_weights(Weight* out, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
inline void store_rounded(Weight* out, F32 x) { store_weights(out, x); }

// sums[r][c] += weights[r] . panels[c], R rows kSpan apart and C panels, `steps` pairs of each; asks for what is
// `after` them.
template <std::int32_t R, std::int32_t C>
[[gnu::always_inline]] inline void multiply(F32 (&sums)[R][C], const Weight* weights,
                                            const std::uint32_t* const (&panels)[C],
                                            const std::uint32_t* const (&after)[C], std::int32_t steps) {
  for (std::int32_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C; ++c) prefetch(after[c] + s * 16);
    __m512bh columns[C];
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C; ++c)
      columns[c] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panels[c] + s * 16));
#pragma GCC unroll 8
    for (std::int32_t r = 0; r < R; ++r) {
      std::int32_t pair;
      __builtin_memcpy(&pair, weights + r * kSpan + 2 * s, sizeof(pair));
      const auto weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (std::int32_t c = 0; c < C; ++c) sums[r][c].v = _mm512_dpbf16_ps(sums[r][c].v, columns[c], weight);
    }
  }
}

}  // namespace
}  // namespace millrace

#include "attention_body.h"

namespace millrace {

const AttentionKernels attention_avx512_bf16{attend_item, merge_parts};

}  // namespace millrace

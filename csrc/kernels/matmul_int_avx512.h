// Dot products of the bytes of one block: unsigned weights of two tiles with `kRows` rows of signed activations.
#pragma once

#include "simd_int_avx512.h"
// The vectors come first.
#include "matmul_epilogue.h"

namespace millrace {
namespace {

inline constexpr std::int32_t kMostRows = 8;  // 16 of 32 registers are sums

inline __m512i load_line(const std::byte* p) { return _mm512_load_si512(p); }
inline void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
// Four activations for every lane.
inline __m512i load_quad(const std::byte* p) {
  std::int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi32(quad);
}

// What sums of int8 weights start at: these are stored as w + 128.
inline I32 start(std::int32_t row_sum) { return fill(-128 * row_sum); }

// 64 k: weights[2 tiles][16 quads][16 channels][4]. Read in order: twice as fast from memory as both tiles at once.
template <std::int32_t kRows>
inline void add_int8(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* ahead, const std::byte* x,
                     std::size_t row_bytes) {
#pragma GCC unroll 2
  for (std::int32_t tile = 0; tile < 2; ++tile) {
    for (std::int32_t quad = 0; quad < 16; ++quad) {
      const std::int32_t line = (tile * 16 + quad) * 64;
      prefetch(ahead + line);
      const __m512i w = load_line(weights + line);
#pragma GCC unroll 16
      for (std::int32_t r = 0; r < kRows; ++r) {
        const __m512i x_quad = load_quad(x + static_cast<std::size_t>(r) * row_bytes + quad * 4);
        sums[r][tile].v = _mm512_dpbusd_epi32(sums[r][tile].v, w, x_quad);
      }
    }
  }
}

// 32 k: weights[8 quads][16 channels][4], tile 0 in the low nibbles, tile 1 in the high ones.
template <std::int32_t kRows>
inline void add_int4(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* ahead, const std::byte* x,
                     std::size_t row_bytes) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (std::int32_t quad = 0; quad < 8; ++quad) {
    prefetch(ahead + quad * 64);
    const __m512i both = load_line(weights + quad * 64);
    const __m512i low = _mm512_and_si512(both, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
#pragma GCC unroll 16
    for (std::int32_t r = 0; r < kRows; ++r) {
      const __m512i x_quad = load_quad(x + static_cast<std::size_t>(r) * row_bytes + quad * 4);
      sums[r][0].v = _mm512_dpbusd_epi32(sums[r][0].v, low, x_quad);
      sums[r][1].v = _mm512_dpbusd_epi32(sums[r][1].v, high, x_quad);
    }
  }
}

}  // namespace
}  // namespace millrace

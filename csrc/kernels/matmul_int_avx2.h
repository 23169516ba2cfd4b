// Dot products of the bytes of one block: unsigned weights of two tiles with `kRows` rows of signed activations.
#pragma once

#include "simd_int_avx2.h"
// The vectors come first.
#include "matmul_epilogue.h"

namespace millrace {
namespace {

inline constexpr std::int32_t kMostRows = 2;  // 8 of 16 registers are sums

inline __m256i load_half_line(const std::byte* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
inline void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
// Four activations for every lane.
inline __m256i load_quad(const std::byte* p) {
  std::int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return _mm256_set1_epi32(quad);
}

// What sums of int8 weights start at: add_int8 takes their 128 off.
inline I32 start(std::int32_t) { return fill(0); }

// 64 k: weights[2 tiles][16 quads][16 channels][4], read in order. The unsigned operand of maddubs is
// |w|, the signed one takes the sign of w: 2 * 127 * 127 fits 16 bits.
template <std::int32_t kRows>
inline void add_int8(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* ahead, const std::byte* x,
                     std::size_t row_bytes) {
  const __m256i offset = _mm256_set1_epi8(-128);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 2
  for (std::int32_t tile = 0; tile < 2; ++tile) {
    for (std::int32_t quad = 0; quad < 16; ++quad) {
      const std::int32_t line = (tile * 16 + quad) * 64;
      prefetch(ahead + line);
#pragma GCC unroll 2
      for (std::int32_t v = 0; v < 2; ++v) {
        const __m256i w = _mm256_xor_si256(load_half_line(weights + line + v * 32), offset);
        const __m256i size = _mm256_abs_epi8(w);
#pragma GCC unroll 16
        for (std::int32_t r = 0; r < kRows; ++r) {
          const __m256i x_quad = load_quad(x + static_cast<std::size_t>(r) * row_bytes + quad * 4);
          const __m256i products = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x_quad, w));
          __m256i& sum = sums[r][tile * 2 + v].v;
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, ones));
        }
      }
    }
  }
}

// 32 k: weights[8 quads][16 channels][4], tile 0 in the low nibbles, tile 1 in the high ones. Eight pairs of products,
// each within 2 * 15 * 127, add up in 16 bits.
template <std::int32_t kRows>
inline void add_int4(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* ahead, const std::byte* x,
                     std::size_t row_bytes) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i halves[kRows][kVectors];
  for (auto& row : halves) {
    for (auto& half : row) half = _mm256_setzero_si256();
  }
  for (std::int32_t quad = 0; quad < 8; ++quad) {
    prefetch(ahead + quad * 64);
#pragma GCC unroll 16
    for (std::int32_t v = 0; v < 2; ++v) {
      const __m256i both = load_half_line(weights + quad * 64 + v * 32);
      const __m256i low = _mm256_and_si256(both, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
#pragma GCC unroll 16
      for (std::int32_t r = 0; r < kRows; ++r) {
        const __m256i x_quad = load_quad(x + static_cast<std::size_t>(r) * row_bytes + quad * 4);
        halves[r][v] = _mm256_add_epi16(halves[r][v], _mm256_maddubs_epi16(low, x_quad));
        halves[r][2 + v] = _mm256_add_epi16(halves[r][2 + v], _mm256_maddubs_epi16(high, x_quad));
      }
    }
  }
  for (std::int32_t r = 0; r < kRows; ++r) {
    for (std::int32_t v = 0; v < kVectors; ++v) {
      sums[r][v].v = _mm256_add_epi32(sums[r][v].v, _mm256_madd_epi16(halves[r][v], _mm256_set1_epi16(1)));
    }
  }
}

}  // namespace
}  // namespace millrace

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

// So few rows wait for memory. They ask for little beside the weights, four quads of activations at once, and in loops
// that stay loops: the processor foresees what an instruction will load by what it loaded before, so that unrolled
// sixteen times the same loads come at half the speed.
inline constexpr std::int32_t kFewRows = 3;

inline __m512i load_quads(const std::byte* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int kQuad>
inline __m512i quad_of(__m512i quads) {
  return _mm512_shuffle_epi32(quads, static_cast<_MM_PERM_ENUM>(kQuad * 0x55));
}

// add_int8 of few rows, for one tile.
template <std::int32_t kTile, std::int32_t kRows>
inline void add_int8_few(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* x,
                         std::size_t row_bytes) {
#pragma GCC unroll 1
  for (std::int32_t quad = 0; quad < 16; quad += 4) {
    const std::byte* lines = weights + quad * 64;
#pragma GCC unroll 4
    for (std::int32_t r = 0; r < kRows; ++r) {
      const __m512i quads = load_quads(x + static_cast<std::size_t>(r) * row_bytes + quad * 4);
      __m512i sum = sums[r][kTile].v;
      sum = _mm512_dpbusd_epi32(sum, load_line(lines), quad_of<0>(quads));
      sum = _mm512_dpbusd_epi32(sum, load_line(lines + 64), quad_of<1>(quads));
      sum = _mm512_dpbusd_epi32(sum, load_line(lines + 128), quad_of<2>(quads));
      sums[r][kTile].v = _mm512_dpbusd_epi32(sum, load_line(lines + 192), quad_of<3>(quads));
    }
  }
}

// 64 k: weights[2 tiles][16 quads][16 channels][4]. Read in order: twice as fast from memory as both tiles at once.
template <std::int32_t kRows>
inline void add_int8(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* ahead, const std::byte* x,
                     std::size_t row_bytes) {
  if constexpr (kRows <= kFewRows) {
    add_int8_few<0>(sums, weights, x, row_bytes);
    add_int8_few<1>(sums, weights + 16 * 64, x, row_bytes);
    return;
  }
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

// add_int4 of few rows.
template <std::int32_t kRows>
inline void add_int4_few(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* x,
                         std::size_t row_bytes) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 1
  for (std::int32_t quad = 0; quad < 8; quad += 4) {
    const std::byte* lines = weights + quad * 64;
    const __m512i both[4] = {load_line(lines), load_line(lines + 64), load_line(lines + 128), load_line(lines + 192)};
#pragma GCC unroll 4
    for (std::int32_t r = 0; r < kRows; ++r) {
      const __m512i quads = load_quads(x + static_cast<std::size_t>(r) * row_bytes + quad * 4);
      const __m512i x_quads[4] = {quad_of<0>(quads), quad_of<1>(quads), quad_of<2>(quads), quad_of<3>(quads)};
#pragma GCC unroll 4
      for (std::int32_t i = 0; i < 4; ++i) {
        const __m512i low = _mm512_and_si512(both[i], mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both[i], 4), mask);
        sums[r][0].v = _mm512_dpbusd_epi32(sums[r][0].v, low, x_quads[i]);
        sums[r][1].v = _mm512_dpbusd_epi32(sums[r][1].v, high, x_quads[i]);
      }
    }
  }
}

// 32 k: weights[8 quads][16 channels][4], tile 0 in the low nibbles, tile 1 in the high ones.
template <std::int32_t kRows>
inline void add_int4(I32 (&sums)[kRows][kVectors], const std::byte* weights, const std::byte* ahead, const std::byte* x,
                     std::size_t row_bytes) {
  if constexpr (kRows <= kFewRows) return add_int4_few(sums, weights, x, row_bytes);
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

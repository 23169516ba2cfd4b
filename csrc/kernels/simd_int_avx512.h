// Integers beside the vectors of simd_avx512.h: 16 int32, and dot products of bytes. Internal linkage, as there.
#pragma once

#include "simd_avx512.h"

namespace millrace {
namespace {

inline I32 fill(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32 load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(std::int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I32 shift_left(I32 a, unsigned n) { return {_mm512_slli_epi32(a.v, n)}; }
inline I32 shift_right(I32 a, unsigned n) { return {_mm512_srli_epi32(a.v, n)}; }  // fills with zeros
inline I32 bits(F32 x) { return {_mm512_castps_si512(x.v)}; }
inline F32 from_bits(I32 x) { return {_mm512_castsi512_ps(x.v)}; }
inline std::int32_t sum(I32 x) { return _mm512_reduce_add_epi32(x.v); }

inline I32 load_bytes(const std::uint8_t* p) {  // 16 of them
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I32 load_bytes(const std::int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_bytes(std::int8_t* p, I32 x) {  // in [-128, 127]
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
// a * b where a is in [0, 32767] and b in [-32768, 32767].
inline I32 multiply_halves(I32 a, I32 b) { return {_mm512_madd_epi16(a.v, b.v)}; }

// Lanes i and i ^ kDistance change places.
template <std::int32_t kDistance>
inline F32 exchange(F32 x) {
  if constexpr (kDistance == 1) return {_mm512_permute_ps(x.v, 0xb1)};
  if constexpr (kDistance == 2) return {_mm512_permute_ps(x.v, 0x4e)};
  if constexpr (kDistance == 4) return {_mm512_castpd_ps(_mm512_permutex_pd(_mm512_castps_pd(x.v), 0x4e))};
  if constexpr (kDistance == 8) return {_mm512_shuffle_f32x4(x.v, x.v, 0x4e)};
}

// Rows become columns.
inline void transpose(F32 (&x)[kLanes]) {
  __m512 a[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  const auto pairs = [](__m512 low, __m512 high, bool upper) {
    const __m512d l = _mm512_castps_pd(low);
    const __m512d h = _mm512_castps_pd(high);
    return _mm512_castpd_ps(upper ? _mm512_unpackhi_pd(l, h) : _mm512_unpacklo_pd(l, h));
  };
  __m512 b[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 4; ++j) b[i + j] = pairs(a[i + j / 2], a[i + 2 + j / 2], j % 2 != 0);
  }
  for (int j = 0; j < 4; ++j) {  // b[4 i + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4 i ...
    const __m512 first_even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 first_odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 last_even = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 last_odd = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    x[j].v = _mm512_shuffle_f32x4(first_even, last_even, 0x88);
    x[4 + j].v = _mm512_shuffle_f32x4(first_odd, last_odd, 0x88);
    x[8 + j].v = _mm512_shuffle_f32x4(first_even, last_even, 0xdd);
    x[12 + j].v = _mm512_shuffle_f32x4(first_odd, last_odd, 0xdd);
  }
}

}  // namespace
}  // namespace millrace

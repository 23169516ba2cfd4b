// Integers beside the vectors of simd_avx2.h: 8 int32, and dot products of bytes. Internal linkage, as there.
#pragma once

#include "simd_avx2.h"

namespace millrace {
namespace {

inline I32 fill(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
inline I32 load(const std::int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store(std::int32_t* p, I32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
inline I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I32 shift_left(I32 a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
inline I32 shift_right(I32 a, int n) { return {_mm256_srli_epi32(a.v, n)}; }  // fills with zeros
inline I32 bits(F32 x) { return {_mm256_castps_si256(x.v)}; }
inline F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.v)}; }
inline std::int32_t sum(I32 x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 1)));
}

inline I32 load_bytes(const std::uint8_t* p) {  // 8 of them
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline I32 load_bytes(const std::int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_bytes(std::int8_t* p, I32 x) {  // in [-128, 127]
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
// a * b where a is in [0, 32767] and b in [-32768, 32767].
inline I32 multiply_halves(I32 a, I32 b) { return {_mm256_madd_epi16(a.v, b.v)}; }

// Lanes i and i ^ kDistance change places.
template <std::int32_t kDistance>
inline F32 exchange(F32 x) {
  if constexpr (kDistance == 1) return {_mm256_permute_ps(x.v, 0xb1)};
  if constexpr (kDistance == 2) return {_mm256_permute_ps(x.v, 0x4e)};
  if constexpr (kDistance == 4) return {_mm256_permute2f128_ps(x.v, x.v, 0x01)};
}

// Rows become columns.
inline void transpose(F32 (&x)[kLanes]) {
  __m256 a[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  const auto pairs = [](__m256 low, __m256 high, bool upper) {
    const __m256d l = _mm256_castps_pd(low);
    const __m256d h = _mm256_castps_pd(high);
    return _mm256_castpd_ps(upper ? _mm256_unpackhi_pd(l, h) : _mm256_unpacklo_pd(l, h));
  };
  for (int j = 0; j < 4; ++j) {
    const __m256 first = pairs(a[j / 2], a[2 + j / 2], j % 2 != 0);  // columns j and 4 + j of rows 0 to 3
    const __m256 last = pairs(a[4 + j / 2], a[6 + j / 2], j % 2 != 0);
    x[j].v = _mm256_permute2f128_ps(first, last, 0x20);
    x[4 + j].v = _mm256_permute2f128_ps(first, last, 0x31);
  }
}

}  // namespace
}  // namespace millrace

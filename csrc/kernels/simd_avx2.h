// Vectors of 8 float32. Everything has internal linkage: each instruction set compiles its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace millrace {
namespace {

inline constexpr std::int32_t kLanes = 8;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};

inline F32 zero() { return {_mm256_setzero_ps()}; }
inline F32 fill(float x) { return {_mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
inline __m256i first(std::int32_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The first n lanes, 0 <= n < 8; the others are zero, and not touched.
inline F32 load(const float* p, std::int32_t n) { return {_mm256_maskload_ps(p, first(n))}; }
inline void store(float* p, F32 x, std::int32_t n) { _mm256_maskstore_ps(p, first(n), x.v); }

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// max and min give b where either is NaN.
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0F), a.v)}; }
inline F32 round(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 where_less(F32 a, F32 b, F32 yes, F32 no) {  // a < b ? yes : no
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

inline I32 to_int(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }  // to nearest, ties to even
inline F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
// a * 2^n, n a whole number in [-252, 252]; in two steps, so that results below the normal range round once.
inline F32 scale_by_power(F32 a, F32 n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i part = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(part)), power(_mm256_sub_epi32(whole, part)))};
}

// In a fixed order: halves, quarters, pairs.
inline float sum(F32 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float maximum(F32 x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline F32 from_bf16(__m128i half) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))}; }
// The first n of 8 16-bit numbers; none beyond them is touched.
inline __m128i load_halves(const std::uint16_t* p, std::int32_t n) {
  alignas(16) std::uint16_t lanes[8] = {};
  for (std::int32_t i = 0; i < n; ++i) lanes[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
inline F32 load_bf16(const std::uint16_t* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F32 load_bf16(const std::uint16_t* p, std::int32_t n) { return from_bf16(load_halves(p, n)); }
// Round to nearest, ties to even. Finite numbers only.
inline __m128i to_bf16(F32 x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i halves = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
inline void store_bf16(std::uint16_t* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
inline void store_bf16(std::uint16_t* p, F32 x, std::int32_t n) {
  alignas(16) std::uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), to_bf16(x));
  for (std::int32_t i = 0; i < n; ++i) p[i] = lanes[i];
}
inline F32 load_f16(const std::uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline F32 load_f16(const std::uint16_t* p, std::int32_t n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }

// Pairs of bf16 in the lanes of 32 bits: a bf16 is the upper half of a float32.
inline I32 load_pairs(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline I32 fill_pairs(const void* p) { return {_mm256_set1_epi32(*static_cast<const std::int32_t*>(p))}; }
inline F32 lower(I32 pairs) { return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.v, 16))}; }
inline F32 upper(I32 pairs) { return {_mm256_castsi256_ps(_mm256_and_si256(pairs.v, _mm256_set1_epi32(-0x10000)))}; }
inline void store_pairs(void* p, I32 pairs) { _mm256_storeu_si256(static_cast<__m256i*>(p), pairs.v); }
// Pairs of int8 as pairs of bf16, which hold them exactly.
inline I32 load_int8_pairs(const void* p) {
  const __m256i pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  const __m256i low = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16)));
  const __m256i high = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 16)));
  return {_mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA)};
}

// Into the second-level cache, which has room for more requests than the first.
[[gnu::always_inline]] inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace millrace

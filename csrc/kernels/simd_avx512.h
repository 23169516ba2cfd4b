// Vectors of 16 float32. Everything has internal linkage: each instruction set compiles its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace millrace {
namespace {

inline constexpr std::int32_t kLanes = 16;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};

inline F32 zero() { return {_mm512_setzero_ps()}; }
inline F32 fill(float x) { return {_mm512_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline __mmask16 first(std::int32_t n) { return static_cast<__mmask16>((1U << n) - 1U); }
// The first n lanes, 0 <= n < 16; the others are zero, and not touched.
inline F32 load(const float* p, std::int32_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, F32 x, std::int32_t n) { _mm512_mask_storeu_ps(p, first(n), x.v); }

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// max and min give b where either is NaN.
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 where_less(F32 a, F32 b, F32 yes, F32 no) {  // a < b ? yes : no
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}

inline I32 to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, ties to even
inline F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F32 scale_by_power(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n a whole number

// In a fixed order: halves, quarters, pairs.
inline float sum(F32 x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float maximum(F32 x) { return _mm512_reduce_max_ps(x.v); }

inline F32 load_bf16(const std::uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline F32 load_bf16(const std::uint16_t* p, std::int32_t n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// Round to nearest, ties to even. Finite numbers only.
inline __m256i to_bf16(F32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline void store_bf16(std::uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
inline void store_bf16(std::uint16_t* p, F32 x, std::int32_t n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x)); }
inline F32 load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32 load_f16(const std::uint16_t* p, std::int32_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

// Pairs of bf16 in the lanes of 32 bits: a bf16 is the upper half of a float32.
inline I32 load_pairs(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I32 fill_pairs(const void* p) { return {_mm512_set1_epi32(*static_cast<const std::int32_t*>(p))}; }
inline F32 lower(I32 pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs.v, 16))}; }
inline F32 upper(I32 pairs) { return {_mm512_castsi512_ps(_mm512_and_si512(pairs.v, _mm512_set1_epi32(-0x10000)))}; }
inline void store_pairs(void* p, I32 pairs) { _mm512_storeu_si512(p, pairs.v); }
// Pairs of int8 as pairs of bf16, which hold them exactly.
inline I32 load_int8_pairs(const void* p) {
  const __m512i pairs = _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16)));
  const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(pairs, 16)));
  return {_mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(low, 16), high)};
}

// Into the second-level cache, which has room for more requests than the first.
[[gnu::always_inline]] inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace millrace

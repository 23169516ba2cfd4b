#include "simd_avx2.h"

namespace millrace {
namespace {

constexpr int kPanels = 1;  // of 16 columns, times kTogether: sums that fit the registers
constexpr int kVectors = 2;

inline F32 even(const std::uint32_t* pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)), 16))};
}
inline F32 odd(const std::uint32_t* pairs) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
  return {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
inline F32 load_int8(const std::int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

}  // namespace
}  // namespace millrace

#include "attention_fma.h"
//
#include "attention_body.h"

namespace millrace {

const AttentionKernels attention_avx2{attend_item, merge_parts};

}  // namespace millrace

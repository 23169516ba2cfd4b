#include "simd_avx512.h"

namespace millrace {
namespace {

constexpr int kPanels = 4;  // of 16 columns, times kTogether: sums that fit the registers
constexpr int kVectors = 1;

inline F32 even(const std::uint32_t* pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16))};
}
inline F32 odd(const std::uint32_t* pairs) {
  const __m512i both = _mm512_loadu_si512(pairs);
  return {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
inline F32 load_int8(const std::int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

}  // namespace
}  // namespace millrace

#include "attention_fma.h"
//
#include "attention_body.h"

namespace millrace {

const AttentionKernels attention_avx512{attend_item, merge_parts};

}  // namespace millrace

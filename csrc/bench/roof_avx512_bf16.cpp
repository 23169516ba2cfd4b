#include <immintrin.h>

#include "roof_loops.h"

namespace millrace::roof::avx512_bf16 {

void bf16(std::int64_t rounds) {
  __m512 sum[kAccumulators];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  __m512i a = _mm512_set1_epi16(0x3f00);  // a half
  for (std::int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(a));  // might change: without it the compiler would compute the loop's end at once
    for (__m512& s : sum) s = _mm512_dpbf16_ps(s, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(a));
  }
  for (__m512& s : sum) asm volatile("" : "+v"(s));
}

}  // namespace millrace::roof::avx512_bf16

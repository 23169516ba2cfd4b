#include <immintrin.h>

#include "roof_loops.h"

// An empty statement that might change the register: without it the compiler would compute the loop's end at once.
#define MILLRACE_KEEP(x) asm volatile("" : "+v"(x))

namespace millrace::roof::avx512 {

void fp32(std::int64_t rounds) {
  __m512 sum[kAccumulators];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  __m512 a = _mm512_set1_ps(0.5F);
  __m512 b = _mm512_set1_ps(0.25F);
  for (std::int64_t i = 0; i < rounds; ++i) {
    MILLRACE_KEEP(a);
    MILLRACE_KEEP(b);
    for (__m512& s : sum) s = _mm512_fmadd_ps(a, b, s);
  }
  for (__m512& s : sum) MILLRACE_KEEP(s);
}

void int8(std::int64_t rounds) {
  __m512i sum[kAccumulators];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  __m512i a = _mm512_set1_epi8(3);
  __m512i b = _mm512_set1_epi8(5);
  for (std::int64_t i = 0; i < rounds; ++i) {
    MILLRACE_KEEP(a);
    MILLRACE_KEEP(b);
    for (__m512i& s : sum) s = _mm512_dpbusd_epi32(s, a, b);
  }
  for (__m512i& s : sum) MILLRACE_KEEP(s);
}

void read(const void* data, std::size_t bytes) {
  const auto* from = static_cast<const char*>(data);
  __m512i sum[4];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (std::size_t at = 0; at + 256 <= bytes; at += 256) {
    for (std::size_t i = 0; i < 4; ++i) {
      _mm_prefetch(from + at + i * 64 + 4096, _MM_HINT_T0);
      sum[i] = _mm512_xor_si512(sum[i], _mm512_load_si512(from + at + i * 64));
    }
  }
  for (__m512i& s : sum) MILLRACE_KEEP(s);
}

}  // namespace millrace::roof::avx512

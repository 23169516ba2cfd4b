#include <immintrin.h>

#include "roof_loops.h"

// An empty statement that might change the register: without it the compiler would compute the loop's end at once.
#define MILLRACE_KEEP(x) asm volatile("" : "+x"(x))

namespace millrace::roof::avx2 {

void fp32(std::int64_t rounds) {
  __m256 sum[kAccumulators];
  for (__m256& s : sum) s = _mm256_setzero_ps();
  __m256 a = _mm256_set1_ps(0.5F);
  __m256 b = _mm256_set1_ps(0.25F);
  for (std::int64_t i = 0; i < rounds; ++i) {
    MILLRACE_KEEP(a);
    MILLRACE_KEEP(b);
    for (__m256& s : sum) s = _mm256_fmadd_ps(a, b, s);
  }
  for (__m256& s : sum) MILLRACE_KEEP(s);
}

void int8(std::int64_t rounds) {
  __m256i sum[kAccumulators];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi8(3);
  __m256i b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::int64_t i = 0; i < rounds; ++i) {
    for (__m256i& s : sum) {
      MILLRACE_KEEP(a);
      s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  }
  for (__m256i& s : sum) MILLRACE_KEEP(s);
}

void read(const void* data, std::size_t bytes) {
  const auto* from = static_cast<const char*>(data);
  __m256i sum[8];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (std::size_t at = 0; at + 256 <= bytes; at += 256) {
    for (std::size_t i = 0; i < 8; ++i) {
      if (i % 2 == 0) _mm_prefetch(from + at + i * 32 + 4096, _MM_HINT_T0);
      sum[i] = _mm256_xor_si256(sum[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at + i * 32)));
    }
  }
  for (__m256i& s : sum) MILLRACE_KEEP(s);
}

}  // namespace millrace::roof::avx2

#include "simd_avx512.h"
// After the vectors.
#include "matmul_bf16_body.h"

namespace millrace {
namespace {

struct PairMultiply {
  static constexpr int kMostRows = 12, kFewRows = 7;

  template <int kRows, int kCount>
  static void add(const std::byte* weights, const std::byte* x, std::int64_t row_bytes, F32 (&sums)[kRows][kCount]) {
    __m512bh w[kCount];
#pragma GCC unroll 2
    for (int i = 0; i < kCount; ++i) w[i] = reinterpret_cast<__m512bh>(load_pairs(weights + vector_offset(i)).v);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto pair = reinterpret_cast<__m512bh>(fill_pairs(x + r * row_bytes).v);
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) sums[r][i].v = _mm512_dpbf16_ps(sums[r][i].v, w[i], pair);
    }
  }
};

}  // namespace

void matmul_bf16_avx512_bf16(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output,
                             Ranges ranges) {
  matmul_bf16<PairMultiply>(weights, x, output, ranges);
}

}  // namespace millrace

// int8 by int8 on tiles: exact int32 sums over all of k, scaled as millrace/matmul.h says.
#pragma once

#include "matmul_whole_tiles.h"

namespace millrace {
namespace {

struct Int8Tiles {
  static constexpr std::int32_t kPerStep = 64;

  template <int c, int a, int b>
  static void multiply() {
    tile::multiply_int8<c, a, b>();
  }

  static void finished(const PackedMatrix& weights, const Activations& x, std::int32_t row, std::int32_t block,
                       const std::byte* from, F32 (&sums)[kVectors]) {
    const float* scales = static_cast<const float*>(weights.scales) + block * kColumns;
    const __m512i offset = _mm512_set1_epi32(128 * x.sums[row]);  // weights are stored as w + 128
    const F32 scale = fill(x.scales[row]);
    for (std::int32_t i = 0; i < kVectors; ++i) {
      const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(from + i * kLanes * 4), offset);
      sums[i] = scale * (load(scales + i * kLanes) * to_float(I32{sum}));
    }
  }
};

}  // namespace
}  // namespace millrace

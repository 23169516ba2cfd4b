// int8 weights, the same for each instruction set. matmul_int_<isa>.h is included before.
#pragma once

#include "matmul_int_rows.h"

namespace millrace {
namespace {

struct Int8 {
  static constexpr std::size_t kNear = 0;  // the processor's own prefetching is faster where it is left alone

  template <std::int32_t kRows>
  static void tile(const Tile& tile) {
    const Activations& x = tile.x;
    I32 dots[kRows][kVectors];
#pragma GCC unroll 16
    for (std::int32_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (I32& dot : dots[r]) dot = start(x.sums[tile.row + r]);
    }
    const std::byte* rows = x.data + offset(tile.row, x.row_bytes);
    for (std::int32_t k = 0; k < x.k; k += 64) {
      const std::size_t at = offset(k, kColumns);
      add_int8(dots, tile.data + at, tile.ahead + at, rows + k, x.row_bytes);
    }
    const float* scales = static_cast<const float*>(tile.weights.scales) + tile.block * kColumns;
    F32 sums[kRows][kVectors];
#pragma GCC unroll 16
    for (std::int32_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (std::int32_t v = 0; v < kVectors; ++v) sums[r][v] = load(scales + v * kLanes) * to_float(dots[r][v]);
    }
    finish_tile(tile, sums);
  }
};

inline void matmul_int8(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges) {
  const std::size_t padded_k = (static_cast<std::size_t>(weights.k) + 63) / 64 * 64;
  for_each_tile<Int8>(weights, x, output, ranges, padded_k * kColumns);
}

}  // namespace
}  // namespace millrace

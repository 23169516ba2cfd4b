// int4 weights, the same for each instruction set. matmul_int_<isa>.h is included before.
#pragma once

#include "matmul_int_rows.h"

namespace millrace {
namespace {

struct Int4 {
  static constexpr std::size_t kNear = 4096;

  template <std::int32_t kRows>
  static void tile(const Tile& tile) {
    const Activations& x = tile.x;
    const std::int32_t padded_k = (x.k + 63) / 64 * 64;
    const std::int32_t groups = activation_groups(Width::int4, x.k, x.group);
    const std::byte* rows = x.data + offset(tile.row, x.row_bytes);
    const auto* scales = static_cast<const std::uint16_t*>(tile.weights.scales) + offset(tile.block * groups, kColumns);
    const std::uint8_t* zeros = tile.weights.zeros + offset(tile.block * groups, kColumns);
    const std::int32_t* row_sums = x.sums + offset(tile.row, static_cast<std::size_t>(groups));
    F32 sums[kRows][kVectors];
#pragma GCC unroll 16
    for (auto& row : sums) {
#pragma GCC unroll 16
      for (F32& value : row) value = zero();
    }
    for (std::int32_t g = 0; g < groups; ++g) {
      I32 dots[kRows][kVectors];
#pragma GCC unroll 16
      for (std::int32_t v = 0; v < kVectors; ++v) {
        const I32 zero_point = load_bytes(zeros + g * kColumns + v * kLanes);
#pragma GCC unroll 16
        for (std::int32_t r = 0; r < kRows; ++r) {
          dots[r][v] = multiply_halves(zero_point, fill(-row_sums[r * groups + g]));
        }
      }
      const std::int32_t first_k = g * x.group;
      const std::int32_t last_k = first_k + x.group < padded_k ? first_k + x.group : padded_k;
      for (std::int32_t k = first_k; k < last_k; k += 32) {
        const std::size_t at = offset(k, kColumns / 2);
        add_int4(dots, tile.data + at, tile.ahead + at, rows + k, x.row_bytes);
      }
#pragma GCC unroll 16
      for (std::int32_t v = 0; v < kVectors; ++v) {
        const F32 scale = load_bf16(scales + g * kColumns + v * kLanes);
#pragma GCC unroll 16
        for (std::int32_t r = 0; r < kRows; ++r) sums[r][v] = fma(scale, to_float(dots[r][v]), sums[r][v]);
      }
    }
    F32 results[kRows][kVectors];  // in memory, so that `sums` need not be
#pragma GCC unroll 16
    for (std::int32_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (std::int32_t v = 0; v < kVectors; ++v) results[r][v] = sums[r][v];
    }
    finish_tile(tile, results);
  }
};

inline void matmul_int4(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges) {
  const std::size_t padded_k = (static_cast<std::size_t>(weights.k) + 63) / 64 * 64;
  for_each_tile<Int4>(weights, x, output, ranges, padded_k * kColumns / 2);
}

}  // namespace
}  // namespace millrace

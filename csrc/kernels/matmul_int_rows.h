// Walks a range of rows and blocks in tiles of rows that fit the registers. matmul_int_<isa>.h is included before.
#pragma once

#include "matmul_kernels.h"

namespace millrace {
namespace {

// One tile of rows of one block.
struct Tile {
  const PackedMatrix& weights;
  const Activations& x;
  const MatmulOutput& output;
  std::int32_t row, block;
  const std::byte* data;   // of the block
  const std::byte* ahead;  // what to prefetch while `data` is read, the same length; `data` itself: nothing
};

inline std::size_t offset(std::int32_t i, std::size_t step) { return static_cast<std::size_t>(i) * step; }

template <std::int32_t kRows>
inline void finish_tile(const Tile& tile, F32 (&sums)[kRows][kVectors]) {
  for (std::int32_t r = 0; r < kRows; ++r) {
    const F32 scale = fill(tile.x.scales[tile.row + r]);
    for (F32& value : sums[r]) value = scale * value;
    finish(tile.output, tile.weights.n, tile.row + r, tile.block, sums[r]);
  }
}

// Calls Kernel::tile<rows>, rows in [1, kRows].
template <typename Kernel, std::int32_t kRows = kMostRows>
inline void tile_of(std::int32_t rows, const Tile& tile) {
  if (rows == kRows) return Kernel::template tile<kRows>(tile);
  if constexpr (kRows > 1) tile_of<Kernel, kRows - 1>(rows, tile);
}

// Blocks outermost: each is read from memory once and serves all rows from the cache. The first tile of rows fetches
// what the next block needs; a tile that is alone, what lies Kernel::kNear bytes ahead.
template <typename Kernel>
inline void for_each_tile(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges,
                          std::size_t block_bytes) {
  const std::int32_t rows = ranges.last_row - ranges.first_row;
  const std::int32_t tiles = (rows + kMostRows - 1) / kMostRows;
  for (std::int32_t block = ranges.first_block; block < ranges.last_block; ++block) {
    const std::byte* data = weights.data + offset(block, block_bytes);
    const std::byte* next = tiles == 1                      ? data + Kernel::kNear
                            : block + 1 < ranges.last_block ? data + block_bytes
                                                            : data;
    for (std::int32_t i = 0; i < tiles; ++i) {  // of nearly equal size
      const std::int32_t row = ranges.first_row + rows * i / tiles;
      const std::int32_t last = ranges.first_row + rows * (i + 1) / tiles;
      tile_of<Kernel>(last - row, {weights, x, output, row, block, data, i == 0 ? next : data});
    }
  }
}

}  // namespace
}  // namespace millrace

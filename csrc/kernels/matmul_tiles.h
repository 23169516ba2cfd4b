// What products on tiles share: which rows meet which weights when, and one step of k. simd_avx512.h and one of
// tiles_{amx,emulated}.h are included before.
//
// 32 rows by the 32 channels of a block take four tiles of sums, and each step of k four loads and four products:
// a piece. While the tiles of a piece work, vectors take the rows of the piece before to memory.
#pragma once

#include "matmul_epilogue.h"
#include "matmul_kernels.h"
#include "tile_scratch.h"

namespace millrace {
namespace {

inline constexpr std::int32_t kPieceRows = 2 * tile::kRows;
inline constexpr std::int64_t kStepBytes = tile::kRowBytes;   // of a row of activations in a step of k
inline constexpr std::int64_t kBlockStep = 2 * tile::kBytes;  // of a block in it
inline constexpr std::size_t kSumStride = kColumns * 4;
inline constexpr std::int64_t kSumBytes = kPieceRows * kColumns * 4;  // of a piece

// Blocking. A chunk of a block stays in the first cache (32 KiB) for all rows, which stream from the second (512 KiB);
// these come from beyond it once for the blocks of a panel, whose sums (256 KiB) wait between chunks.
//
// A bound, counted in what GCC 12 makes of 512 rows of bf16 and int8, and not measured: a piece of a chunk is 64
// products (1,024 cycles at 16 each), 68 loads (544 cycles at 8 from the first cache), 4 stores (64) and 28 other
// instructions a step. Products bound it while the second cache gives 36 bytes a cycle: 32 KiB of rows, 4 of sums. If
// the hint not to keep rows goes unheeded, weights leave the first cache and it is 68: at 48 bytes a cycle, 70 % of the
// roof.
inline constexpr std::int32_t kMostRows = 512;  // that share one reading of the weights
inline constexpr std::int32_t kPanel = 4;       // blocks
inline constexpr std::int32_t kChunk = 16;      // steps
inline constexpr std::int64_t kPanelSums = kMostRows / kPieceRows * kPanel * kSumBytes;

// Up to 32 rows in one tile or two of equal height. Where there are 16 rows, tiles have 16: the last ones overlap those
// before, rather than change the shapes; rows do not depend on each other, so what is computed twice is the same.
struct PieceRows {
  std::int32_t first;   // row of the first tile
  std::int32_t second;  // of the second tile, from `first`; 0: there is none
  std::int32_t skip;    // rows that belong to the piece before
  std::int32_t count;   // rows, with those
};

inline std::int32_t least(std::int32_t a, std::int32_t b) { return a < b ? a : b; }

inline std::int32_t tile_height(const Ranges& ranges) { return least(tile::kRows, ranges.last_row - ranges.first_row); }

// From `row` on, before `end`.
inline PieceRows piece_rows(const Ranges& ranges, std::int32_t row, std::int32_t end) {
  if (end - row > tile::kRows) {
    const std::int32_t count = least(end - row, kPieceRows);
    return {row, count - tile::kRows, 0, count};
  }
  const std::int32_t height = tile_height(ranges);
  return {end - height, 0, row - (end - height), height};
}

// Rows by a block by steps [first_step, last_step) of k.
struct Piece {
  PieceRows rows;
  std::int32_t block;
  std::int32_t first_step, last_step;
  bool first, last;        // of k
  bool alone;              // the only rows: nothing but the rows is read twice
  std::byte* sums;         // [32][32], from chunk to chunk
  const std::byte* ahead;  // weights that are wanted after those of this chunk
  std::int32_t lines;      // of them to prefetch in each step
};

// Packed weights as the walk sees them.
struct Steps {
  const std::byte* data;
  std::int64_t bytes;  // of a block in a step
  std::int32_t count;  // of k

  const std::byte* at(std::int32_t block, std::int32_t step) const {
    return data + (std::int64_t{block} * count + step) * bytes;
  }
};

// Calls prepare(block, first step, last step) before the pieces of a block's chunk, and piece(Piece) for each.
template <typename Prepare, typename Multiply>
inline void for_each_piece(const Ranges& ranges, const Steps& steps, std::int32_t chunk, std::byte* sums,
                           Prepare prepare, Multiply multiply) {
  for (std::int32_t row = ranges.first_row; row < ranges.last_row; row += kMostRows) {
    const std::int32_t end = row + least(kMostRows, ranges.last_row - row);
    const std::int32_t pieces = (end - row + kPieceRows - 1) / kPieceRows;
    const std::int32_t width = pieces == 1 ? 1 : kPanel;
    const auto lines = static_cast<std::int32_t>((steps.bytes / 64 + pieces - 1) / pieces);
    for (std::int32_t panel = ranges.first_block; panel < ranges.last_block; panel += width) {
      const std::int32_t panel_end = least(panel + width, ranges.last_block);
      for (std::int32_t step = 0; step < steps.count; step += chunk) {
        const std::int32_t step_end = least(step + chunk, steps.count);
        const bool last = step_end == steps.count;
        for (std::int32_t block = panel; block < panel_end; ++block) {
          prepare(block, step, step_end);
          const bool more = !last || block + width < ranges.last_block;
          const std::byte* ahead = last ? steps.at(block + width, 0) : steps.at(block, step_end);
          for (std::int32_t i = 0; i < pieces; ++i) {
            multiply(Piece{piece_rows(ranges, row + i * kPieceRows, end), block, step, step_end, step == 0, last,
                           pieces == 1, sums + (i * kPanel + block - panel) * kSumBytes,
                           ahead + std::int64_t{i} * (step_end - step) * lines * 64, more ? lines : 0});
          }
        }
      }
    }
  }
}

inline void prefetch(const std::byte*& ahead, std::int32_t lines) {
  for (std::int32_t i = 0; i < lines; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
}

// Where the operands of a step are.
struct Operands {
  const std::byte* a[2];  // first row of each tile
  std::size_t stride;     // of rows
  const std::byte* b[2];
};

template <int t, bool kOnce>
inline void load_operand(const std::byte* from, std::size_t stride) {
  if constexpr (kOnce) {
    tile::load_once<t>(from, stride);
  } else {
    tile::load<t>(from, stride);
  }
}

// kTall: two tiles of rows. kAlone: weights are read once, rows again with the next block; else the other way round.
template <class Kind, bool kTall, bool kAlone>
inline void multiply_step(const Operands& from) {
  load_operand<tile::kA0, !kAlone>(from.a[0], from.stride);
  load_operand<tile::kB0, kAlone>(from.b[0], tile::kRowBytes);
  Kind::template multiply<tile::kC00, tile::kA0, tile::kB0>();
  load_operand<tile::kB1, kAlone>(from.b[1], tile::kRowBytes);
  Kind::template multiply<tile::kC01, tile::kA0, tile::kB1>();
  if constexpr (kTall) {
    load_operand<tile::kA1, !kAlone>(from.a[1], from.stride);
    Kind::template multiply<tile::kC10, tile::kA1, tile::kB0>();
    Kind::template multiply<tile::kC11, tile::kA1, tile::kB1>();
  }
}

template <bool kTall>
inline void clear_sums() {
  tile::clear<tile::kC00>();
  tile::clear<tile::kC01>();
  if constexpr (kTall) {
    tile::clear<tile::kC10>();
    tile::clear<tile::kC11>();
  }
}

// `to` has a row of 32 sums for each row of the piece: where the tiles overlap, equal sums are written twice.
template <bool kTall>
inline void store_sums(std::byte* to, std::int32_t second) {
  constexpr std::int64_t kTile = tile::kRowBytes;
  const std::int64_t below = second * static_cast<std::int64_t>(kSumStride);
  tile::store<tile::kC00>(to, kSumStride);
  tile::store<tile::kC01>(to + kTile, kSumStride);
  if constexpr (kTall) {
    tile::store<tile::kC10>(to + below, kSumStride);
    tile::store<tile::kC11>(to + below + kTile, kSumStride);
  }
}

template <bool kTall>
inline void load_sums(const std::byte* from, std::int32_t second) {
  constexpr std::int64_t kTile = tile::kRowBytes;
  const std::int64_t below = second * static_cast<std::int64_t>(kSumStride);
  tile::load<tile::kC00>(from, kSumStride);
  tile::load<tile::kC01>(from + kTile, kSumStride);
  if constexpr (kTall) {
    tile::load<tile::kC10>(from + below, kSumStride);
    tile::load<tile::kC11>(from + below + kTile, kSumStride);
  }
}

// Calls `multiply` with the piece's kind as constants.
template <typename Multiply>
inline void by_kind(const Piece& piece, Multiply multiply) {
  const bool tall = piece.rows.second != 0;
  if (tall && piece.alone) return multiply.template operator()<true, true>();
  if (tall) return multiply.template operator()<true, false>();
  if (piece.alone) return multiply.template operator()<false, true>();
  multiply.template operator()<false, false>();
}

}  // namespace
}  // namespace millrace

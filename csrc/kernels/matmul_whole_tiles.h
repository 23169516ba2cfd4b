// Products whose sums need nothing on the way along k (bf16, int8). A Kind has
//   multiply<c, a, b>()                           the tile instruction
//   finished(weights, x, row, block, sums, out)   the 32 sums of a row of a block in memory as float32
#pragma once

#include "matmul_tiles.h"

namespace millrace {
namespace {

template <class Kind>
class WholeTiles {
 public:
  WholeTiles(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output)
      : weights_(weights), x_(x), output_(output) {}

  void run(const Ranges& ranges) {
    if (ranges.first_row >= ranges.last_row || ranges.first_block >= ranges.last_block) return;
    const std::int32_t steps = (weights_.k + Kind::kPerStep - 1) / Kind::kPerStep;
    const bool few = ranges.last_row - ranges.first_row <= kPieceRows;
    from_ = {weights_.data, kBlockStep, steps};
    std::byte* const sums = tile_scratch(few ? kSumBytes : kPanelSums);
    tile::configure(tile::shapes(tile_height(ranges), tile::kRowBytes));
    for_each_piece(
        ranges, from_, few ? steps : kChunk, sums, [](std::int32_t, std::int32_t, std::int32_t) {},
        [this](const Piece& piece) {
          by_kind(piece, [&]<bool kTall, bool kAlone>() { multiply<kTall, kAlone>(piece); });
        });
    tile::release();
    leave(kPieceRows);
  }

 private:
  template <bool kTall, bool kAlone>
  [[gnu::noinline]] void multiply(const Piece& piece) {
    const std::byte* row = x_.data + static_cast<std::size_t>(piece.rows.first) * x_.row_bytes;
    const std::byte* a = row + piece.first_step * kStepBytes;
    const std::byte* b = from_.at(piece.block, piece.first_step);
    const std::byte* ahead = piece.ahead;
    const std::size_t stride = x_.row_bytes;
    const std::size_t below = static_cast<std::size_t>(piece.rows.second) * stride;
    const std::int32_t steps = piece.last_step - piece.first_step;
    const std::int32_t pace = (kPieceRows + steps - 1) / steps;
    piece.first ? clear_sums<kTall>() : load_sums<kTall>(piece.sums, piece.rows.second);
    for (std::int32_t step = 0; step < steps; ++step, a += kStepBytes, b += kBlockStep) {
      multiply_step<Kind, kTall, kAlone>({{a, a + below}, stride, {b, b + tile::kBytes}});
      prefetch(ahead, piece.lines);
      leave(pace);
    }
    store_sums<kTall>(piece.sums, piece.rows.second);
    if (piece.last) {
      leaving_ = piece;
      next_ = piece.rows.skip;
    }
  }

  // Up to `rows` rows of the last finished piece go to memory.
  void leave(std::int32_t rows) {
    if (next_ < leaving_.rows.count) leave_rows(least(next_ + rows, leaving_.rows.count));
  }

  [[gnu::noinline]] void leave_rows(std::int32_t end) {
    for (; next_ < end; ++next_) {
      const std::int32_t row = leaving_.rows.first + next_;
      F32 sums[kVectors];
      Kind::finished(weights_, x_, row, leaving_.block, leaving_.sums + next_ * static_cast<std::int64_t>(kSumStride),
                     sums);
      finish(output_, weights_.n, row, leaving_.block, sums);
    }
  }

  const PackedMatrix& weights_;
  const Activations& x_;
  const MatmulOutput& output_;
  Steps from_{};
  Piece leaving_{};  // its rows from `next_` on are still in its sums
  std::int32_t next_ = 0;
};

}  // namespace
}  // namespace millrace

// int4 by int8 on tiles. A chunk of a block is unpacked to bytes once and serves all rows; tiles sum the integers of a
// group, vectors scale them and add them to float32 sums, group after group, as millrace/matmul.h says: some groups at
// a time, so that a float32 sum is loaded and stored once for them. A row's group of 32 channels takes seven vector
// operations beside 4 cycles of products (of 1, in groups of 32): here vectors bound as much as tiles do.
#pragma once

#include "matmul_tiles.h"

namespace millrace {
namespace {

inline constexpr std::int32_t kInt4Chunk = 8;  // steps of 64 k: the first cache also holds sums of groups
inline constexpr std::int32_t kSpilled = 4;    // groups whose integers leave the tiles before they are added up
inline constexpr std::int64_t kPackedStep = kBlockStep / 2;
inline constexpr std::int32_t kMostGroups = kInt4Chunk * 64 / 32;  // of a chunk

// What multiplies and corrects the integers of a group in a block.
struct GroupScales {
  float scale[kColumns];
  float minus_zero[kColumns];
};

struct Int4Scratch {
  std::byte weights[kInt4Chunk * kBlockStep];  // a chunk of a block, unpacked
  std::byte spilled[2][kSpilled][kSumBytes];   // the rows of one set leave while the other is written
  GroupScales groups[2][kMostGroups];          // of two chunks, likewise
  std::byte sums[kPanelSums];                  // last: of few rows only the first piece's are there
};
inline constexpr std::size_t kFewRowsScratch = sizeof(Int4Scratch) - kPanelSums + kSumBytes;

struct Int4Tiles {
  template <int c, int a, int b>
  static void multiply() {
    tile::multiply_int8<c, a, b>();
  }
};

// [16 quads of k][16 channels][4], low nibbles to the first tile, high ones to the second.
inline void unpack_step(const std::byte* from, std::byte* to) {
  const __m512i low = _mm512_set1_epi8(15);
  for (std::int32_t i = 0; i < tile::kBytes; i += 64) {
    const __m512i both = _mm512_loadu_si512(from + i);
    _mm512_store_si512(to + i, _mm512_and_si512(both, low));
    _mm512_store_si512(to + tile::kBytes + i, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
  }
}

class GroupedTiles {
 public:
  GroupedTiles(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output)
      : weights_(weights),
        x_(x),
        output_(output),
        from_{weights.data, kPackedStep, (weights.k + 63) / 64},
        depth_(least(weights.group, 64)),
        per_group_(weights.group / depth_),
        groups_((from_.count * 64 + weights.group - 1) / weights.group) {}

  void run(const Ranges& ranges) {
    if (ranges.first_row >= ranges.last_row || ranges.first_block >= ranges.last_block) return;
    const bool few = ranges.last_row - ranges.first_row <= kPieceRows;
    scratch_ = reinterpret_cast<Int4Scratch*>(tile_scratch(few ? kFewRowsScratch : sizeof(Int4Scratch)));
    tile::configure(tile::shapes(tile_height(ranges), depth_));
    for_each_piece(
        ranges, from_, kInt4Chunk, scratch_->sums,
        [this](std::int32_t block, std::int32_t first, std::int32_t last) { unpack(block, first, last); },
        [this](const Piece& piece) {
          by_kind(piece, [&]<bool kTall, bool kAlone>() { multiply<kTall, kAlone>(piece); });
        });
    tile::release();
    leave(kPieceRows);
  }

 private:
  // Groups whose integers are in `spilled`, on their way to the sums of a piece.
  struct Spill {
    Piece piece;
    const std::byte (*spilled)[kSumBytes];
    const GroupScales* scales;
    std::int32_t first, last;  // groups
    bool first_of_k, last_of_k;
  };

  std::int32_t group_of(std::int32_t step) const { return step * 64 / weights_.group; }
  std::int32_t groups_to(std::int32_t step) const { return (step * 64 + weights_.group - 1) / weights_.group; }

  void unpack(std::int32_t block, std::int32_t first, std::int32_t last) {
    for (std::int32_t step = first; step < last; ++step) {
      unpack_step(from_.at(block, step), scratch_->weights + (step - first) * kBlockStep);
    }
    scales_ = scratch_->groups[turn_of_scales_ ^= 1];
    GroupScales* to = scratch_->groups[turn_of_scales_];
    for (std::int32_t g = group_of(first); g < groups_to(last); ++g, ++to) {
      const std::int64_t at = (std::int64_t{block} * groups_ + g) * kColumns;
      for (std::int32_t i = 0; i < kColumns; i += kLanes) {
        const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights_.zeros + at + i));
        store(to->minus_zero + i, zero() - to_float(I32{_mm512_cvtepu8_epi32(zeros)}));
        store(to->scale + i, load_bf16(static_cast<const std::uint16_t*>(weights_.scales) + at + i));
      }
    }
  }

  template <bool kTall, bool kAlone>
  [[gnu::noinline]] void multiply(const Piece& piece) {
    const std::byte* rows = x_.data + static_cast<std::size_t>(piece.rows.first) * x_.row_bytes;
    const std::size_t below = static_cast<std::size_t>(piece.rows.second) * x_.row_bytes;
    const std::byte* ahead = piece.ahead;
    const std::int32_t lines = (piece.lines * depth_ + 63) / 64;
    const std::int32_t first_group = group_of(piece.first_step);
    const std::int32_t last_group = groups_to(piece.last_step);
    for (std::int32_t from = first_group; from < last_group; from += kSpilled) {
      const std::int32_t to = least(from + kSpilled, last_group);
      const std::int32_t first_unit = from * per_group_;
      const std::int32_t last_unit = least(to * per_group_, piece.last_step * 64 / depth_);
      const std::int32_t pace = (kPieceRows - 1) / (last_unit - first_unit) + 1;
      auto* const spilled = scratch_->spilled[turn_of_spill_ ^= 1];
      for (std::int32_t g = from; g < to; ++g) {
        clear_sums<kTall>();
        for (std::int32_t unit = g * per_group_; unit < least((g + 1) * per_group_, last_unit); ++unit) {
          const std::byte* a = rows + unit * depth_;
          const std::int32_t k = unit * depth_ - piece.first_step * 64;
          const std::byte* b = scratch_->weights + k / 64 * kBlockStep + k % 64 * tile::kRows;
          multiply_step<Int4Tiles, kTall, kAlone>({{a, a + below}, x_.row_bytes, {b, b + tile::kBytes}});
          prefetch(ahead, lines);
          leave(pace);
        }
        store_sums<kTall>(spilled[g - from], piece.rows.second);
      }
      spill_ = {piece, spilled, scales_ + (from - first_group), from, to, from == 0, to == groups_};
      next_ = piece.rows.skip;
    }
  }

  // Up to `rows` rows of the last spilled groups go to the sums, or with the last group of k to memory.
  void leave(std::int32_t rows) {
    if (next_ < spill_.piece.rows.count) leave_rows(least(next_ + rows, spill_.piece.rows.count));
  }

  [[gnu::noinline]] void leave_rows(std::int32_t end) {
    for (; next_ < end; ++next_) leave_row(next_);
  }

  void leave_row(std::int32_t i) const {
    const std::int32_t row = spill_.piece.rows.first + i;
    const std::int32_t* totals = x_.sums + std::int64_t{row} * groups_ + spill_.first;
    float* kept = reinterpret_cast<float*>(spill_.piece.sums) + i * kColumns;
    F32 sums[kVectors];
#pragma GCC unroll 2
    for (std::int32_t v = 0; v < kVectors; ++v) sums[v] = spill_.first_of_k ? zero() : load(kept + v * kLanes);
    for (std::int32_t g = 0; g < spill_.last - spill_.first; ++g) {
      const F32 total = to_float(I32{_mm512_set1_epi32(totals[g])});
      const auto* dots = reinterpret_cast<const std::int32_t*>(spill_.spilled[g]) + i * kColumns;
#pragma GCC unroll 2
      for (std::int32_t v = 0; v < kVectors; ++v) {
        const F32 dot = to_float(I32{_mm512_loadu_si512(dots + v * kLanes)});
        const F32 sum = fma(load(spill_.scales[g].minus_zero + v * kLanes), total, dot);  // exact: less than 2^24
        sums[v] = fma(load(spill_.scales[g].scale + v * kLanes), sum, sums[v]);
      }
    }
    if (!spill_.last_of_k) {
#pragma GCC unroll 2
      for (std::int32_t v = 0; v < kVectors; ++v) store(kept + v * kLanes, sums[v]);
      return;
    }
    const F32 scale = fill(x_.scales[row]);
    F32 results[kVectors];  // in memory, so that `sums` need not be
#pragma GCC unroll 2
    for (std::int32_t v = 0; v < kVectors; ++v) results[v] = scale * sums[v];
    finish(output_, weights_.n, row, spill_.piece.block, results);
  }

  const PackedMatrix& weights_;
  const Activations& x_;
  const MatmulOutput& output_;
  Steps from_;
  std::int32_t depth_;      // bytes of k in a tile: 64, or a group of 32
  std::int32_t per_group_;  // tiles of k in a group
  std::int32_t groups_;     // of a channel
  Int4Scratch* scratch_ = nullptr;
  std::int32_t turn_of_scales_ = 0;
  std::int32_t turn_of_spill_ = 0;
  const GroupScales* scales_ = nullptr;  // of the chunk that was unpacked last
  Spill spill_{};                        // its rows from `next_` on have not left
  std::int32_t next_ = 0;
};

}  // namespace
}  // namespace millrace

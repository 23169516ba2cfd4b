// Products with bf16 weights, for any instruction set; simd_*.h is included before. A `Multiply` has
//   kMostRows                  rows whose sums with two vectors of channels stay in registers
//   kFewRows                   rows whose arithmetic is done before the next weights arrive from memory
//   add<kRows, kCount>(...)    adds the products of one pair of k to the sums of some rows and vectors
// Each output has one accumulator, which meets k in ascending order: its value depends on nothing else.
#pragma once

#include <cstddef>

#include "matmul_epilogue.h"
#include "matmul_kernels.h"

namespace millrace {
namespace {

inline constexpr std::int32_t kPairs = 16;                   // of k, in a chunk
inline constexpr std::int64_t kTileBytes = kPairs * 16 * 4;  // a chunk of 16 channels
inline constexpr std::int64_t kChunkBytes = 2 * kTileBytes;
inline constexpr std::int64_t kAhead = 4096;  // bytes to prefetch

// Vector i of the channels of a block, from the start of a chunk, for its first pair.
constexpr std::int64_t vector_offset(std::int32_t i) {
  constexpr std::int32_t kOfTile = kVectors / 2;
  return i / kOfTile * kTileBytes + i % kOfTile * kLanes * 4;
}

// Where a product reads: chunks of one block, and as much of the rows.
struct Operands {
  const std::byte* weights;
  const std::byte* x;
  std::int64_t row_bytes;
  std::int64_t chunks;
};

// The sums of `kRows` rows with vectors [first, first + kCount) of the block; `kStep` of them meet a pair at a time.
template <class Multiply, int kRows, int kCount, int kStep>
inline void accumulate(Operands from, std::int32_t first, F32 (&out)[kRows][kVectors]) {
  F32 sums[kCount / kStep][kRows][kStep];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kCount; ++i) sums[i / kStep / kRows][i / kStep % kRows][i % kStep] = zero();
  for (; from.chunks > 0; --from.chunks) {
#pragma GCC unroll 2
    for (int step = 0; step < kCount / kStep; ++step) {
      const std::byte* weights = from.weights + vector_offset(first + step * kStep);
#pragma GCC unroll 4
      for (std::int32_t pair = 0; pair < kPairs; ++pair) {
        if constexpr (kCount == kStep) {
          __builtin_prefetch(from.weights + kAhead + pair * 128);
          __builtin_prefetch(from.weights + kAhead + pair * 128 + 64);
        }
        Multiply::template add<kRows, kStep>(weights + pair * 64, from.x + pair * 4, from.row_bytes, sums[step]);
      }
    }
    from.weights += kChunkBytes;
    from.x += kPairs * 4;
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kCount; ++i) {
    out[i / kStep % kRows][first + i / kStep / kRows * kStep + i % kStep] =
        sums[i / kStep / kRows][i / kStep % kRows][i % kStep];
  }
}

// Few rows wait for memory: they read a block in the order of addresses, tile by tile, and the processor's own
// prefetching follows. More rows are held up by arithmetic: they read a pair of k of both tiles together, so that each
// number of a row is loaded once, and must prefetch, in the order of addresses too.
template <class Multiply, int kRows>
void rows_of_block(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, std::int32_t row,
                   std::int32_t block) {
  constexpr bool kFew = kRows <= Multiply::kFewRows;
  constexpr int kCount = kRows * kVectors <= Multiply::kMostRows * 2 ? kVectors : 2;
  constexpr int kStep = kFew ? kVectors / 2 : kCount;
  const std::int64_t chunks = (weights.k + 31) / 32;
  const auto row_bytes = static_cast<std::int64_t>(x.row_bytes);
  const Operands operands{weights.data + block * chunks * kChunkBytes, x.data + row * row_bytes, row_bytes, chunks};
  F32 sums[kRows][kVectors];
  for (std::int32_t first = 0; first < kVectors; first += kCount) {
    accumulate<Multiply, kRows, kCount, kStep>(operands, first, sums);
  }
  for (int r = 0; r < kRows; ++r) finish(output, weights.n, row + r, block, sums[r]);
}

template <class Multiply, int kRows = Multiply::kMostRows>
void rows_of_block(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, std::int32_t row,
                   std::int32_t rows, std::int32_t block) {
  if (rows == kRows) {
    rows_of_block<Multiply, kRows>(weights, x, output, row, block);
  } else if constexpr (kRows > 1) {
    rows_of_block<Multiply, kRows - 1>(weights, x, output, row, rows, block);
  }
}

// A block's weights meet all rows before the next block's are read.
template <class Multiply>
void matmul_bf16(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, const Ranges& ranges) {
  for (std::int32_t block = ranges.first_block; block < ranges.last_block; ++block) {
    for (std::int32_t row = ranges.first_row; row < ranges.last_row;) {
      const std::int32_t left = ranges.last_row - row;
      const std::int32_t passes = (left + Multiply::kMostRows - 1) / Multiply::kMostRows;
      const std::int32_t rows = (left + passes - 1) / passes;
      rows_of_block<Multiply>(weights, x, output, row, rows, block);
      row += rows;
    }
  }
}

}  // namespace
}  // namespace millrace

// What becomes of the sums of a matrix product, on the way from registers to memory. simd_*.h is included before.
#pragma once

#include "millrace/matmul.h"
#include "simd_math.h"

namespace millrace {
namespace {

inline constexpr std::int32_t kVectors = kColumns / kLanes;  // of one row of a block; the first half is tile 0

// Finishes row `row` of block `block` of a product with `n` output channels.
inline void finish(const MatmulOutput& output, std::int32_t n, std::int32_t row, std::int32_t block,
                   F32 (&sums)[kVectors]) {
  const std::int32_t column = block * kColumns;
  const auto live = [&](std::int32_t i) {  // lanes of vector i that are channels
    const std::int32_t left = n - column - i * kLanes;
    return left < 0 ? 0 : left < kLanes ? left : kLanes;
  };
  if (output.bias != nullptr) {
    for (std::int32_t i = 0; i < kVectors; ++i) {
      const float* bias = output.bias + column + i * kLanes;
      if (live(i) == kLanes) {
        sums[i] = sums[i] + load(bias);
      } else if (live(i) > 0) {
        sums[i] = sums[i] + load(bias, live(i));
      }
    }
  }
  if (output.epilogue == Epilogue::gate) {
    std::uint16_t* half = output.half + row * output.stride + column / 2;
    for (std::int32_t i = 0; i < kVectors / 2; ++i) {
      store_bf16(half + i * kLanes, activate(output.activation, sums[i]) * sums[kVectors / 2 + i]);
    }
    return;
  }
  for (std::int32_t i = 0; i < kVectors; ++i) {
    const std::int32_t count = live(i);
    if (output.epilogue == Epilogue::activate) {
      std::uint16_t* half = output.half + row * output.stride + column + i * kLanes;
      const F32 y = activate(output.activation, sums[i]);
      count == kLanes ? store_bf16(half, y) : store_bf16(half, y, count);
      continue;
    }
    float* out = output.out + row * output.stride + column + i * kLanes;
    if (count == kLanes) {
      store(out, output.epilogue == Epilogue::add ? load(out) + sums[i] : sums[i]);
    } else {
      store(out, output.epilogue == Epilogue::add ? load(out, count) + sums[i] : sums[i], count);
    }
  }
}

}  // namespace
}  // namespace millrace

// bf16 by bf16 on tiles. Sums of 32 k (even and odd ones apart, then together) are added to one float32 for each
// output, k ascending: what TDPBF16PS does, for every number of rows.
#pragma once

#include "matmul_whole_tiles.h"

namespace millrace {
namespace {

struct Bf16Tiles {
  static constexpr std::int32_t kPerStep = 32;

  template <int c, int a, int b>
  static void multiply() {
    tile::multiply_bf16<c, a, b>();
  }

  static void finished(const PackedMatrix&, const Activations&, std::int32_t, std::int32_t, const std::byte* from,
                       F32 (&sums)[kVectors]) {
    for (std::int32_t i = 0; i < kVectors; ++i) sums[i] = load(reinterpret_cast<const float*>(from) + i * kLanes);
  }
};

}  // namespace
}  // namespace millrace

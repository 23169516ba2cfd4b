// The transform of hadamard.h on vectors. simd_int_*.h is included before.
#pragma once

#include "hadamard.h"

namespace millrace {
namespace {

inline constexpr std::int32_t kHadamardVectors = kHadamard / kLanes;

struct Factors {
  alignas(64) float of[kHadamard];
};
template <typename Factor>
constexpr Factors factors(const Factor& factor) {
  Factors result{};
  for (std::int32_t i = 0; i < kHadamard; ++i) result.of[i] = factor(i);
  return result;
}

inline constexpr Factors kHadamardFactors = factors(hadamard_factor);

// Sums and differences of lanes `kDistance` apart.
template <std::int32_t kDistance>
inline void add_across(F32 (&x)[kHadamardVectors]) {
  static constexpr Factors kSigns = factors([](std::int32_t i) { return (i & kDistance) != 0 ? -1.0F : 1.0F; });
  const F32 sign = load(kSigns.of);
  for (F32& value : x) value = fma(value, sign, exchange<kDistance>(value));
}

// H D x / 8 of the 64 numbers of `x`, in place; bit for bit what hadamard() makes of them.
inline void transform(F32 (&x)[kHadamardVectors]) {
#pragma GCC unroll 8
  for (std::int32_t v = 0; v < kHadamardVectors; ++v) x[v] = x[v] * load(kHadamardFactors.of + v * kLanes);
  add_across<1>(x);
  add_across<2>(x);
  add_across<4>(x);
  if constexpr (kLanes == 16) add_across<8>(x);
#pragma GCC unroll 8
  for (std::int32_t distance = 1; distance < kHadamardVectors; distance *= 2) {
#pragma GCC unroll 8
    for (std::int32_t v = 0; v < kHadamardVectors; ++v) {
      if ((v & distance) != 0) continue;
      const F32 low = x[v];
      const F32 high = x[v + distance];
      x[v] = low + high;
      x[v + distance] = low - high;
    }
  }
}

// The same of each lane.
inline void transform_lanes(F32 (&x)[kHadamard]) {
  for (std::int32_t i = 0; i < kHadamard; ++i) x[i] = x[i] * fill(kHadamardFactors.of[i]);
  hadamard(x);
}

}  // namespace
}  // namespace millrace

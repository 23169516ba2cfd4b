// The randomised Hadamard transform, which spreads what a few inputs hold over all of a block: int8 and int4 lose less.
//
// Of every whole block of 64 inputs, both sides of a product become H D x / 8: H is the Hadamard matrix (H H = 64), D a
// diagonal of signs, so that products stay what they were. Without it one large input sets the step of its whole row.
// Inputs behind the last whole block are left as they are.
//
// QuaRot (Ashkboos et al., arXiv 2404.00456) and QuIP# (Tseng et al., arXiv 2402.04396). The signs are those of a bent
// function, i0 i1 + i2 i3 + i4 i5 of the bits of an input's index (Rothaus, 1976): equal inputs, too, are spread
// evenly.
#pragma once

#include <cstdint>

namespace millrace {

inline constexpr std::int32_t kHadamard = 64;

constexpr bool negated(std::int32_t i) {
  return ((i & i >> 1 & 1) ^ (i >> 2 & i >> 3 & 1) ^ (i >> 4 & i >> 5 & 1)) != 0;
}

// What the diagonal and the division make of input i.
constexpr float hadamard_factor(std::int32_t i) { return negated(i) ? -0.125F : 0.125F; }

// H x in place of the eight numbers `step` apart.
template <typename Number>
inline void hadamard_of_8(Number* x, std::int32_t step) {
  Number values[8];
#pragma GCC unroll 8
  for (std::int32_t i = 0; i < 8; ++i) values[i] = x[i * step];
#pragma GCC unroll 3
  for (std::int32_t distance = 1; distance < 8; distance *= 2) {
#pragma GCC unroll 8
    for (std::int32_t i = 0; i < 8; ++i) {
      if ((i & distance) != 0) continue;
      const Number low = values[i];
      const Number high = values[i + distance];
      values[i] = low + high;
      values[i + distance] = low - high;
    }
  }
#pragma GCC unroll 8
  for (std::int32_t i = 0; i < 8; ++i) x[i * step] = values[i];
}

// H x in place, for numbers or vectors of them. The order of additions is the same everywhere: neighbours first.
template <typename Number>
inline void hadamard(Number (&x)[kHadamard]) {
  for (std::int32_t i = 0; i < kHadamard; i += 8) hadamard_of_8(x + i, 1);
  for (std::int32_t i = 0; i < 8; ++i) hadamard_of_8(x + i, 8);
}

}  // namespace millrace

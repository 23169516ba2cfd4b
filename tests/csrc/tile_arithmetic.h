// Float32 as tiles compute: to nearest even, denormals are zeros.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace millrace::testing {

inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0F, x) : x; }

inline float from_bf16(std::uint16_t bits) { return flushed(std::bit_cast<float>(std::uint32_t{bits} << 16)); }

// a * b + c, of bf16 a and b: exact in float64 but for the last rounding, which float32 makes again without harm
// (53 >= 2 * 24 + 2 bits).
inline float multiply_add(float a, float b, float c) {
  return flushed(static_cast<float>(static_cast<double>(a) * b + flushed(c)));
}

inline float add(float a, float b) { return flushed(flushed(a) + flushed(b)); }

}  // namespace millrace::testing

#include "matmul_pack.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace millrace {
namespace {

float from_float16(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16;
  const std::uint32_t exponent = (half >> 10) & 31U;
  const std::uint32_t fraction = half & 0x3ffU;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000U | fraction << 13);
  if (exponent == 0)
    return std::copysign(std::ldexp(static_cast<float>(fraction), -24), std::bit_cast<float>(sign | 1U));
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace

bool to_float32(const void* from, Stored stored, std::int32_t count, float* to) {
  const auto* bytes = static_cast<const std::byte*>(from);
  if (stored == Stored::float32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  } else {
    for (std::int32_t i = 0; i < count; ++i) {
      std::uint16_t half;
      std::memcpy(&half, bytes + i * 2, sizeof half);
      to[i] = stored == Stored::float16 ? from_float16(half) : std::bit_cast<float>(std::uint32_t{half} << 16);
    }
  }
  bool finite = true;
  for (std::int32_t i = 0; i < count; ++i) finite &= std::isfinite(to[i]);
  return finite;
}

}  // namespace millrace

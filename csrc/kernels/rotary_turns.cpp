// Written so that compilers turn the loop into vectors, two doubles each on any x86-64. Nothing is contracted or
// dispatched: the same on every machine.
#include <bit>
#include <cstdint>

#include "millrace/rows.h"

namespace millrace {
namespace {

// A quarter turn, pi / 2, as a part of 27 bits, whose product with 26 bits is exact, and the rest.
constexpr double kQuarterTurn = 0x1.921fb54p+0;
constexpr double kQuarterTurnRest = 0x1.10b4611a62633p-30;
constexpr double kQuarterTurnsPerRadian = 0x1.45f306dc9c883p-1;
// Adding it leaves the nearest whole number in the low bits of the sum.
constexpr double kWhole = 0x1.8p+52;

// On [-pi / 4, pi / 4], within 2^-34: the minimax polynomials of FreeBSD's k_sinf.c and k_cosf.c.
inline double near_sine(double r, double square) {
  const double low = -0x15555554cbac77.0p-55 + square * 0x111110896efbb2.0p-59;
  const double high = -0x1a00f9e2cae774.0p-65 + square * 0x16cd878c3b46a7.0p-71;
  return r + r * square * (low + square * square * high);
}
inline double near_cosine(double square) {
  const double low = -0x1ffffffd0c5e81.0p-54 + square * 0x155553e1053a42.0p-57;
  const double high = -0x16c087e80f1e27.0p-62 + square * 0x199342e0ee5069.0p-68;
  return 1.0 + square * (low + square * square * high);
}

inline std::uint64_t bits(double x) { return std::bit_cast<std::uint64_t>(x); }
// a where every bit of mask is set, b where none is.
inline double choose(std::uint64_t mask, double a, double b) {
  return std::bit_cast<double>((bits(a) & mask) | (bits(b) & ~mask));
}
inline double negate_if(std::uint64_t condition, double x) {
  return std::bit_cast<double>(bits(x) ^ (condition << 63));
}

}  // namespace

void rotary_turns(std::int32_t position, const float* frequencies, float factor, std::int32_t half, float* cosine,
                  float* sine) {
  const auto at = static_cast<float>(position);
  for (std::int32_t i = 0; i < half; ++i) {
    const double angle = at * frequencies[i];
    const double shifted = angle * kQuarterTurnsPerRadian + kWhole;
    const std::uint64_t quarters = bits(shifted);  // modulo 4
    const double count = shifted - kWhole;
    const double r = (angle - count * kQuarterTurn) - count * kQuarterTurnRest;
    const double s = near_sine(r, r * r), c = near_cosine(r * r);
    const std::uint64_t odd = 0 - (quarters & 1);
    cosine[i] = factor * static_cast<float>(negate_if((quarters ^ (quarters >> 1)) & 1, choose(odd, s, c)));
    sine[i] = factor * static_cast<float>(negate_if((quarters >> 1) & 1, choose(odd, c, s)));
  }
}

}  // namespace millrace

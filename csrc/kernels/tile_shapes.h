// Shapes of the eight tiles of a product C += A * B, and which tile is what.
#pragma once

#include <cstdint>

namespace millrace {
namespace {
namespace tile {

inline constexpr std::int32_t kRows = 16;
inline constexpr std::int32_t kRowBytes = 64;
inline constexpr std::int32_t kBytes = kRows * kRowBytes;

// Two tiles of rows (A0, A1) by two tiles of channels (B0, B1).
inline constexpr int kC00 = 0, kC01 = 1, kC10 = 2, kC11 = 3, kA0 = 4, kA1 = 5, kB0 = 6, kB1 = 7;

// The operand of LDTILECFG, palette 1.
struct alignas(64) Shapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64);

// `rows` (1 to 16) of A and C; `depth` bytes (a multiple of 4, to 64) of a row of A, one row of B for each 4.
inline Shapes shapes(std::int32_t rows, std::int32_t depth) {
  Shapes result;
  for (int t = 0; t < 8; ++t) {
    const bool a = t == kA0 || t == kA1;
    const bool b = t == kB0 || t == kB1;
    result.row_bytes[t] = static_cast<std::uint16_t>(a ? depth : kRowBytes);
    result.rows[t] = static_cast<std::uint8_t>(b ? depth / 4 : rows);
  }
  return result;
}

}  // namespace tile
}  // namespace
}  // namespace millrace

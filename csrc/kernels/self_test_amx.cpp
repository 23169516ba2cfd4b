// Compiled for AMX; called only where it is.
#include "amx.h"
#include "tiles_amx.h"

namespace millrace {
namespace {

constexpr std::int32_t kDepth = 16;  // words of 4 bytes in a row of A

// Every word of A is `left`, of B `right`; each number of C is then kDepth times the product of the two.
template <typename Number, typename Multiply>
bool product_is(std::uint32_t left, std::uint32_t right, Number expected, Multiply multiply) {
  alignas(64) std::uint32_t a[tile::kRows][kDepth];
  alignas(64) std::uint32_t b[kDepth][tile::kRows];
  alignas(64) Number c[tile::kRows][tile::kRows];
  for (std::int32_t i = 0; i < tile::kRows; ++i) {
    for (std::int32_t j = 0; j < kDepth; ++j) {
      a[i][j] = left;
      b[j][i] = right;
    }
  }
  tile::configure(tile::shapes(tile::kRows, kDepth * 4));
  tile::load<tile::kA0>(a, tile::kRowBytes);
  tile::load_once<tile::kB0>(b, tile::kRowBytes);
  tile::clear<tile::kC00>();
  multiply();
  tile::store<tile::kC00>(c, tile::kRowBytes);
  tile::release();
  bool right_everywhere = true;
  for (const auto& row : c) {
    for (const Number number : row) right_everywhere &= !(number < expected) && !(number > expected);
  }
  return right_everywhere;
}

}  // namespace

bool tiles_multiply() {
  constexpr std::uint32_t kOneAndTwo = 0x4000'3f80;     // bf16 1, 2
  constexpr std::uint32_t kThreeAndFour = 0x4080'4040;  // bf16 3, 4
  constexpr std::uint32_t kMinusOnes = 0xffff'ffff;     // int8 -1, or uint8 255
  return product_is(kOneAndTwo, kThreeAndFour, 11.0F * kDepth,
                    [] { tile::multiply_bf16<tile::kC00, tile::kA0, tile::kB0>(); }) &&
         product_is(kMinusOnes, kMinusOnes, -255 * 4 * kDepth,
                    [] { tile::multiply_int8<tile::kC00, tile::kA0, tile::kB0>(); });
}

}  // namespace millrace

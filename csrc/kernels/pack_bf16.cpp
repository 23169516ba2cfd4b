#include <bit>
#include <cstring>

#include "matmul_pack.h"

namespace millrace {
namespace {

constexpr std::int32_t kChunk = 32;                   // of k
constexpr std::int32_t kTile = 16;                    // channels
constexpr std::int32_t kNumbers = kColumns * kChunk;  // of a block in a chunk
constexpr std::int32_t kAhead = 4 * kChunk;  // of k: rows far apart are read by turns, which no hardware foresees

// Round to nearest, ties to even.
std::uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// `count` numbers, zeros up to a chunk; false where one is not finite, or too large for bf16.
bool to_bf16(const void* from, Stored stored, std::int32_t count, std::uint16_t* to) {
  std::memset(to, 0, kChunk * sizeof(std::uint16_t));
  bool finite = true;
  if (stored == Stored::bfloat16) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(std::uint16_t));
  } else {
    float numbers[kChunk];
    finite = to_float32(from, stored, count, numbers);
    for (std::int32_t i = 0; i < count; ++i) to[i] = to_bf16(numbers[i]);
  }
  std::uint16_t bad = 0;  // not a bool, so that the loop becomes vectors
  for (std::int32_t i = 0; i < kChunk; ++i) bad |= static_cast<std::uint16_t>((to[i] & 0x7f80U) == 0x7f80U);
  return finite && bad == 0;
}

}  // namespace

bool pack_bf16(const PackedMatrix& matrix, std::int32_t block, const void* const* channels, Stored stored) {
  const std::int32_t chunks = (matrix.k + kChunk - 1) / kChunk;
  const std::int64_t size = stored == Stored::float32 ? 4 : 2;
  auto* out = reinterpret_cast<std::uint16_t*>(matrix.data) + std::int64_t{block} * chunks * kNumbers;
  bool finite = true;
  for (std::int32_t chunk = 0; chunk < chunks; ++chunk, out += kNumbers) {
    const std::int32_t k = chunk * kChunk;
    const std::int32_t count = matrix.k - k < kChunk ? matrix.k - k : kChunk;
    for (std::int32_t c = 0; c < kColumns; ++c) {
      std::uint16_t halves[kChunk] = {};
      if (channels[c] != nullptr) {
        const auto* from = static_cast<const std::byte*>(channels[c]) + k * size;
        for (std::int64_t line = 0; line < kChunk * size; line += 64) __builtin_prefetch(from + kAhead * size + line);
        finite &= to_bf16(from, stored, count, halves);
      }
      std::uint16_t* tile = out + c / kTile * kTile * kChunk + c % kTile * 2;
      for (std::int32_t pair = 0; pair < kChunk / 2; ++pair) std::memcpy(tile + pair * kTile * 2, halves + pair * 2, 4);
    }
  }
  return finite;
}

void unpack_bf16(const PackedMatrix& matrix, std::int32_t channel, float* out) {
  const std::int32_t chunks = (matrix.k + kChunk - 1) / kChunk;
  const std::int32_t c = channel % kColumns;
  const auto* block =
      reinterpret_cast<const std::uint16_t*>(matrix.data) + std::int64_t{channel / kColumns} * chunks * kNumbers;
  const std::uint16_t* tile = block + c / kTile * kTile * kChunk + c % kTile * 2;
  for (std::int32_t k = 0; k < matrix.k; ++k) {
    const std::uint16_t half = tile[k / kChunk * kNumbers + k % kChunk / 2 * kTile * 2 + k % 2];
    out[k] = std::bit_cast<float>(std::uint32_t{half} << 16);
  }
}

}  // namespace millrace

#include "millrace/kv_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "millrace/attention.h"

namespace millrace {
namespace {

constexpr std::int32_t kHalf = 16, kPairs = kBlockTokens / 2;

// To nearest, ties to even.
std::uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Ties to even, for |x| < 2^22: the sum has no room for a fraction.
float nearest(float x) { return (x + 12582912.0F) - 12582912.0F; }

// Token `offset` of a block of one head; dims beyond head_dim become zero.
template <typename T, typename Convert>
void write_keys(T* block, std::int32_t offset, const float* x, std::int32_t head_dim, Convert convert) {
  T* column = block + offset / kHalf * kHalf * padded_dim(head_dim) + offset % kHalf * 2;
  for (std::int32_t d = 0; d < padded_dim(head_dim); d += 2) {
    column[d * kHalf] = d < head_dim ? convert(x[d]) : T{0};
    column[d * kHalf + 1] = d + 1 < head_dim ? convert(x[d + 1]) : T{0};
  }
}

template <typename T, typename Convert>
void write_values(T* block, std::int32_t offset, const float* x, std::int32_t head_dim, Convert convert) {
  for (std::int32_t d = 0; d < padded_dim(head_dim); ++d) {
    T* pair = block + ((d / 16 * kPairs + offset / 2) * 16 + d % 16) * 2;
    pair[offset % 2] = d < head_dim ? convert(x[d]) : T{0};
  }
}

// What int8 stands for one: the largest magnitude becomes 127. Not finite if a number is not.
float scale_of(const float* x, std::int32_t dim) {
  float most = 0.0F;
  for (std::int32_t d = 0; d < dim; ++d) most = std::abs(x[d]) <= most ? most : std::abs(x[d]);
  return most / 127.0F;
}

}  // namespace

std::size_t kv_block_bytes(KVType type, std::int32_t kv_heads, std::int32_t head_dim) {
  const auto numbers =
      static_cast<std::size_t>(kv_heads) * kBlockTokens * static_cast<std::size_t>(padded_dim(head_dim));
  return type == KVType::bf16 ? numbers * 2 : numbers;
}

std::size_t kv_scale_bytes(KVType type, std::int32_t kv_heads) {
  return type == KVType::bf16 ? 0 : static_cast<std::size_t>(kv_heads) * 2 * kBlockTokens * sizeof(float);
}

void write_kv(const KVCache& cache, std::int64_t slot, const float* keys, const float* values, Isa) {
  const std::int32_t dim = cache.head_dim;
  const auto offset = static_cast<std::int32_t>(slot % kBlockTokens);
  for (std::int32_t head = 0; head < cache.kv_heads; ++head, keys += dim, values += dim) {
    const std::int64_t block = slot / kBlockTokens * cache.kv_heads + head;
    const std::int64_t at = block * kBlockTokens * padded_dim(dim);
    if (cache.type == KVType::bf16) {
      write_keys(reinterpret_cast<std::uint16_t*>(cache.keys) + at, offset, keys, dim, to_bf16);
      write_values(reinterpret_cast<std::uint16_t*>(cache.values) + at, offset, values, dim, to_bf16);
      continue;
    }
    const auto quantizer = [](float scale) {
      return [scale](float x) {
        const float q = x / scale;
        return std::abs(q) < 128.0F ? static_cast<std::int8_t>(nearest(q))
                                    : std::int8_t{0};  // else: 0 / 0, or not finite
      };
    };
    float* scales = cache.scales + block * 2 * kBlockTokens + offset;
    scales[0] = scale_of(keys, dim);
    scales[kBlockTokens] = scale_of(values, dim);
    write_keys(reinterpret_cast<std::int8_t*>(cache.keys) + at, offset, keys, dim, quantizer(scales[0]));
    write_values(reinterpret_cast<std::int8_t*>(cache.values) + at, offset, values, dim,
                 quantizer(scales[kBlockTokens]));
  }
}

}  // namespace millrace

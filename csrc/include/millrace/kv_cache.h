// Keys and values in the layout that attention reads: nothing is rearranged after they are written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace millrace {

enum class KVType { bf16, int8 };

inline constexpr std::int32_t kBlockTokens = 32;
inline constexpr std::int32_t kMaxHeadDim = 256;

// The cache of one layer: for each block and KV head
//   keys    [2 halves of 16 tokens][dim/2][16 tokens][2 dims]
//   values  [dim/16][16 pairs of tokens][16 dims][2 tokens]
// with dim padded to 16, as bf16, or as int8 with one float32 scale per token and head:
//   scales  [blocks][kv_heads][2: keys, values][32 tokens]
// `zero` before a block is used again is not needed: attention reads no token beyond the context.
struct KVCache {
  KVType type;
  std::int32_t blocks;
  std::int32_t kv_heads;
  std::int32_t head_dim;  // at most kMaxHeadDim
  std::byte* keys;        // [blocks][kv_heads][32 * padded dim]
  std::byte* values;      // the same
  float* scales;          // int8; else null
};

constexpr std::int32_t padded_dim(std::int32_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Bytes of keys (and of values) of one block of one layer, all KV heads; of scales likewise.
std::size_t kv_block_bytes(KVType type, std::int32_t kv_heads, std::int32_t head_dim);
std::size_t kv_scale_bytes(KVType type, std::int32_t kv_heads);

}  // namespace millrace

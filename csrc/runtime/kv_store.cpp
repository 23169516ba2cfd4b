#include "runtime/kv_store.h"

#include <cstring>

namespace millrace {

std::size_t KVStore::block_bytes(const Network& network, KVType type) {
  std::size_t bytes = 0;
  for (const Layer& layer : network.layers) {
    bytes += 2 * kv_block_bytes(type, layer.kv_heads, layer.head_dim) + kv_scale_bytes(type, layer.kv_heads);
  }
  return bytes;
}

KVStore::KVStore(const Network& network, KVType type, std::int32_t blocks)
    : blocks_(blocks), block_bytes_(block_bytes(network, type)) {
  const auto count = static_cast<std::size_t>(blocks);
  if (count > 0) arena_.emplace(count * block_bytes_ + network.layers.size() * 3 * Arena::kAlignment);
  for (const Layer& layer : network.layers) {
    KVCache cache{type, blocks, layer.kv_heads, layer.head_dim, nullptr, nullptr, nullptr};
    if (count > 0) {
      const std::size_t bytes = count * kv_block_bytes(type, layer.kv_heads, layer.head_dim);
      cache.keys = arena_->array<std::byte>(bytes);
      cache.values = arena_->array<std::byte>(bytes);
      if (type == KVType::int8) {
        cache.scales = arena_->array<float>(count * kv_scale_bytes(type, layer.kv_heads) / sizeof(float));
      }
    }
    layers_.push_back(cache);
  }
}

template <class Visit>
void KVStore::visit(std::int32_t block, Visit&& visit) const {
  for (const KVCache& cache : layers_) {
    const std::size_t bytes = kv_block_bytes(cache.type, cache.kv_heads, cache.head_dim);
    const auto index = static_cast<std::size_t>(block);
    visit(cache.keys + index * bytes, bytes);
    visit(cache.values + index * bytes, bytes);
    if (cache.scales != nullptr) {
      const std::size_t size = kv_scale_bytes(cache.type, cache.kv_heads);
      visit(reinterpret_cast<std::byte*>(cache.scales) + index * size, size);
    }
  }
}

void KVStore::copy_block(std::int32_t source, std::int32_t target) {
  const std::ptrdiff_t distance = target - source;
  visit(source, [distance](std::byte* at, std::size_t bytes) {
    std::memmove(at + distance * static_cast<std::ptrdiff_t>(bytes), at, bytes);
  });
}

void KVStore::read_block(std::int32_t block, std::byte* to) const {
  visit(block, [&to](const std::byte* at, std::size_t bytes) {
    std::memcpy(to, at, bytes);
    to += bytes;
  });
}

void KVStore::write_block(std::int32_t block, const std::byte* from) {
  visit(block, [&from](std::byte* at, std::size_t bytes) {
    std::memcpy(at, from, bytes);
    from += bytes;
  });
}

}  // namespace millrace

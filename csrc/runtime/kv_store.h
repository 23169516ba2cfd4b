// The paged KV cache of all layers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "millrace/kv_cache.h"
#include "runtime/arena.h"
#include "runtime/network.h"

namespace millrace {

class KVStore {
 public:
  // `blocks` of kBlockTokens tokens for every layer; its pages become memory when they are first written.
  KVStore(const Network& network, KVType type, std::int32_t blocks);

  const KVCache& layer(std::size_t index) const { return layers_[index]; }
  std::int32_t blocks() const { return blocks_; }
  std::size_t block_bytes() const { return block_bytes_; }  // of one block in all layers

  static std::size_t block_bytes(const Network& network, KVType type);

  void copy_block(std::int32_t source, std::int32_t target);
  // Layer after layer: keys, values, scales; block_bytes() bytes.
  void read_block(std::int32_t block, std::byte* to) const;
  void write_block(std::int32_t block, const std::byte* from);

 private:
  template <class Visit>
  void visit(std::int32_t block, Visit&& visit) const;

  std::int32_t blocks_;
  std::size_t block_bytes_;
  std::optional<Arena> arena_;
  std::vector<KVCache> layers_;
};

}  // namespace millrace

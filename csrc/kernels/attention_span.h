// Where the keys and values of a span lie, as bf16 that nothing poisons, and what will be read after them.
//
// Blocks are anywhere in memory, so no hardware guesses which is next: each, while it is read, asks for the one that is
// read kAhead blocks later (fewer where there are fewer). Blocks of keys come first, then those of values, then the
// keys of the next span. Between keys and values, while weights are computed and nothing is read, each query that sees
// a whole span asks for one block more; so values ask for what is that much later, and the last of them for nothing.
#pragma once

#include "attention_kernels.h"

namespace millrace {
namespace {

constexpr std::int32_t kPanel = 16;
constexpr std::int32_t kHalves = kSpan / kPanel;
constexpr std::int32_t kBlocks = kSpan / kBlockTokens;
constexpr std::int32_t kPairs = kBlockTokens / 2;
constexpr std::int32_t kAhead = 4;

inline Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// What queries [first, last] of a row see of a span, relative to its beginning; end <= begin: nothing.
inline Range seen_of(const AttentionInput& input, std::int32_t row, std::int32_t first, std::int32_t last,
                     std::int32_t span) {
  const std::int32_t group = input.heads / input.cache.kv_heads, base = span * kSpan;
  const Range seen{visible(input, row, first / group).begin - base, visible(input, row, last / group).end - base};
  return intersect(seen, {0, kSpan});
}

// Blocks of one span and KV head as they are stored, in the order in which they are read: keys, then values.
struct Blocks {
  Range seen;  // positions
  std::int32_t first, count;
  std::int64_t bytes;  // of a block
  const std::byte* data[2 * kBlocks];
  const float* scales[kBlocks];
};

inline Blocks find(const AttentionInput& input, const AttentionItem& item, std::int32_t kv_head, std::int32_t span) {
  const KVCache& cache = input.cache;
  Blocks blocks;
  blocks.seen = seen_of(input, item.row, item.first_query, item.first_query + item.queries - 1, span);
  blocks.first = blocks.seen.begin / kBlockTokens;
  blocks.count = (blocks.seen.end + kBlockTokens - 1) / kBlockTokens - blocks.first;
  blocks.bytes = std::int64_t{kBlockTokens} * padded_dim(cache.head_dim) * (cache.type == KVType::bf16 ? 2 : 1);
  const std::int32_t* table = input.block_tables + item.row * input.table_stride + span * kBlocks + blocks.first;
  for (std::int32_t i = 0; i < blocks.count; ++i) {
    const std::int64_t block = std::int64_t{table[i]} * cache.kv_heads + kv_head;
    blocks.data[i] = cache.keys + block * blocks.bytes;
    blocks.data[blocks.count + i] = cache.values + block * blocks.bytes;
    if (cache.type == KVType::int8) blocks.scales[i] = cache.scales + block * 2 * kBlockTokens;
  }
  return blocks;
}

// What an item reads after a span of one head.
inline Blocks find_next(const AttentionInput& input, const AttentionItem& item, std::int32_t kv_head,
                        std::int32_t span) {
  if (span + 1 < item.spans.end) return find(input, item, kv_head, span + 1);
  if (kv_head + 1 < item.heads.end) return find(input, item, kv_head + 1, item.spans.begin);
  Blocks nothing;
  nothing.count = 0;
  return nothing;
}

// The `later`-th of the blocks that are read from the first of `here` on; null beyond the next span.
inline const std::byte* block_at(const Blocks& here, const Blocks& next, std::int32_t later) {
  const std::int32_t count = 2 * here.count;
  if (later < count) return here.data[later];
  return later - count < 2 * next.count ? next.data[later - count] : nullptr;
}

// What to ask for, and when. `weighings`: how many blocks to ask for between keys and values.
struct Ahead {
  const Blocks &here, &next;
  std::int32_t distance, between;  // in blocks

  Ahead(const Blocks& blocks, const Blocks& after, std::int32_t weighings)
      : here(blocks),
        next(after),
        distance(kAhead < 2 * blocks.count ? kAhead : 2 * blocks.count),
        between(weighings < blocks.count ? weighings : blocks.count) {}

  // While block `i` of `here` is read; where there is nothing left to ask for, the block itself.
  const std::byte* reading(std::int32_t i) const {
    const bool keys = i < here.count, enough = !keys && i >= 2 * here.count - between;
    const std::byte* found = enough ? nullptr : block_at(here, next, i + distance + (keys ? 0 : between));
    return found != nullptr ? found : here.data[i];
  }

  // While the weights of the i-th query are computed; may be null.
  const std::byte* weighing(std::int32_t i) const {
    return i < between ? block_at(here, next, here.count + distance + i) : nullptr;
  }
};

// Panels of bf16 pairs: by half a block of keys, by block of values; and what lies behind them in order of reading.
struct Span {
  bool scaled;
  const std::uint32_t* keys[kHalves];
  const std::uint32_t* values[kBlocks];
  const std::uint32_t* after_keys[kHalves];
  const std::uint32_t* after_values[kBlocks];
  const float* key_scales[kHalves];
  const float* value_scales[kHalves];
  const std::byte* while_weighing[kTogether];  // null: nothing
  std::int64_t block_bytes;
};

// A block of int8 as bf16.
inline void widen(const std::byte* from, std::uint32_t* to, std::int64_t bytes, const std::byte* after) {
  for (std::int64_t i = 0; i < bytes; i += 64) {
    prefetch(after + i);
    for (std::int64_t j = i; j < i + 64; j += 2 * kLanes) store_pairs(to + j / 2, load_int8_pairs(from + j));
  }
}

// Values of a block without those of positions outside `seen`, which may be anything: 0 * NaN is NaN.
inline void copy_seen(const std::uint32_t* from, std::uint32_t* to, std::int32_t dim, Range seen) {
  for (std::int32_t panel = 0; panel < dim / kPanel; ++panel) {
    for (std::int32_t pair = seen.begin / 2; pair < (seen.end + 1) / 2; ++pair) {
      const std::uint32_t low = 2 * pair < seen.begin ? 0 : 0xFFFF;
      const std::uint32_t high = 2 * pair + 1 < seen.end ? 0xFFFF0000 : 0;
      const std::int32_t at = (panel * kPairs + pair) * kPanel;
      for (std::int32_t i = 0; i < kPanel; ++i) to[at + i] = from[at + i] & (low | high);
    }
  }
}

// int8: all of it is widened into `scratch`, and scales say what it stands for.
inline void open_int8(const Blocks& blocks, const Ahead& ahead, Span& span, AttentionScratch& scratch) {
  const std::int64_t words = blocks.bytes / 2;
  for (std::int32_t i = 0; i < 2 * blocks.count; ++i) {
    const std::int32_t b = blocks.first + i % blocks.count;
    std::uint32_t* wide = (i < blocks.count ? scratch.keys : scratch.values) + b * words;
    widen(blocks.data[i], wide, blocks.bytes, ahead.reading(i));
    const float* scales = blocks.scales[i % blocks.count] + i / blocks.count * kBlockTokens;
    for (std::int32_t half = 0; half < 2; ++half) {
      if (i < blocks.count) {
        span.keys[2 * b + half] = span.after_keys[2 * b + half] = wide + half * words / 2;
        span.key_scales[2 * b + half] = scales + half * kPanel;
      } else {
        span.values[b] = span.after_values[b] = wide;
        span.value_scales[2 * b + half] = scales + half * kPanel;
      }
    }
  }
}

// bf16: read where it is, except for blocks of values that end within a pair.
inline void open_bf16(const Blocks& blocks, const Ahead& ahead, Span& span, AttentionScratch& scratch,
                      std::int32_t dim) {
  const std::int64_t words = blocks.bytes / 4;
  for (std::int32_t i = 0; i < blocks.count; ++i) {
    const std::int32_t b = blocks.first + i, v = blocks.count + i;
    for (std::int32_t half = 0; half < 2; ++half) {
      span.keys[2 * b + half] = reinterpret_cast<const std::uint32_t*>(blocks.data[i]) + half * words / 2;
      span.after_keys[2 * b + half] = reinterpret_cast<const std::uint32_t*>(ahead.reading(i)) + half * words / 2;
    }
    span.values[b] = reinterpret_cast<const std::uint32_t*>(blocks.data[v]);
    span.after_values[b] = reinterpret_cast<const std::uint32_t*>(ahead.reading(v));
    const Range inside =
        intersect({blocks.seen.begin - b * kBlockTokens, blocks.seen.end - b * kBlockTokens}, {0, kBlockTokens});
    if (inside.begin % 2 == 0 && inside.end % 2 == 0) continue;
    copy_seen(span.values[b], scratch.values + b * words, dim, inside);
    span.values[b] = scratch.values + b * words;
  }
}

// `queries`: of the first pass, which asks for what comes next; but int8 is read before any weights are computed.
inline void open_span(const AttentionInput& input, const Blocks& blocks, const Blocks& next, std::int32_t queries,
                      Span& span, AttentionScratch& scratch) {
  span.scaled = input.cache.type == KVType::int8;
  span.block_bytes = blocks.bytes;
  const std::int32_t weighings = queries * (blocks.seen.end - blocks.seen.begin) / kSpan;
  const Ahead ahead(blocks, next, span.scaled ? 0 : weighings);
  for (std::int32_t i = 0; i < queries; ++i) span.while_weighing[i] = ahead.weighing(i);
  if (span.scaled) {
    open_int8(blocks, ahead, span, scratch);
  } else {
    open_bf16(blocks, ahead, span, scratch, padded_dim(input.cache.head_dim));
  }
}

}  // namespace
}  // namespace millrace

// What AttentionPlan holds.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention_kernels.h"

namespace millrace {

// Queries of one row, for every KV head.
struct AttentionTile {
  std::int32_t row, first_query, queries;
  Range spans;
  std::int64_t cost;  // of one KV head
};

struct AttentionPlan::State {
  std::vector<AttentionTile> tiles, sorted;  // `sorted`: room for sorting
  std::vector<AttentionItem> items;
  std::vector<AttentionMerge> merges;
  std::vector<float> parts;
  std::unique_ptr<AttentionScratch[]> scratch;  // one per thread
  std::int32_t threads = 0;
};

}  // namespace millrace

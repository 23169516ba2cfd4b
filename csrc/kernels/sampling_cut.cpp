#include "sampling_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

namespace millrace::sampling {
namespace {

constexpr std::size_t kFew = 32;  // sorting so few is cheaper than a histogram
constexpr std::size_t kBins = 256;

// At least `count` tokens reach the count-th highest of the blocks' maxima, and few more do.
float bound_of_preferred(const Row& row, std::int32_t count, Workspace& space) {
  const std::size_t here = blocks(row.vocab);
  if (static_cast<std::size_t>(count) > here) return -std::numeric_limits<float>::infinity();
  auto& keys = space.thresholds;
  keys.assign(row.block_highest, row.block_highest + here);
  std::nth_element(keys.begin(), keys.begin() + (count - 1), keys.end(), std::greater<>());
  return value(keys[static_cast<std::size_t>(count - 1)]);
}

}  // namespace

// Each round spreads the candidates over bins and goes on with one bin: the highest and the lowest logit
// fall apart, so it ends; where all are equal, they stand in order already.
Candidate completes(std::vector<Candidate>& candidates, std::uint64_t need) {
  while (candidates.size() > kFew) {
    float top = candidates.front().logit, bottom = top;
    for (const Candidate& c : candidates) {
      top = std::max(top, c.logit);
      bottom = std::min(bottom, c.logit);
    }
    const float bins_per_logit = static_cast<float>(kBins - 1) / (top - bottom);
    if (!std::isfinite(bins_per_logit)) break;
    const auto bin = [=](const Candidate& c) { return static_cast<std::size_t>((top - c.logit) * bins_per_logit); };
    std::array<std::uint64_t, kBins> mass{};
    for (const Candidate& c : candidates) mass[bin(c)] += static_cast<std::uint64_t>(c.weight);
    std::size_t chosen = 0;
    while (mass[chosen] < need) need -= mass[chosen++];
    std::erase_if(candidates, [&](const Candidate& c) { return bin(c) != chosen; });
  }
  if (!std::is_sorted(candidates.begin(), candidates.end(), preferred)) {
    std::sort(candidates.begin(), candidates.end(), preferred);
  }
  auto at = candidates.begin();
  while (static_cast<std::uint64_t>(at->weight) < need) need -= static_cast<std::uint64_t>((at++)->weight);
  return *at;
}

void gather_preferred(const Row& row, std::int32_t count, Workspace& space) {
  auto& candidates = space.candidates;
  candidates.clear();
  const float least = bound_of_preferred(row, count, space);
  for (std::int32_t begin = 0, block = 0; begin < row.vocab; begin += kBlock, ++block) {
    if (value(row.block_highest[block]) < least) continue;
    for (std::int32_t id = begin, end = std::min(begin + kBlock, row.vocab); id < end; ++id) {
      if (row.logits[id] >= least) candidates.push_back({row.logits[id], id, 0});
    }
  }
  std::nth_element(candidates.begin(), candidates.begin() + (count - 1), candidates.end(), preferred);
  candidates.resize(static_cast<std::size_t>(count));
}

}  // namespace millrace::sampling

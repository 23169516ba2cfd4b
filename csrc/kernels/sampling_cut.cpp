#include "sampling_cut.h"

#include <algorithm>
#include <cmath>

namespace millrace::sampling {
namespace {

constexpr std::size_t kFew = 32;  // sorting so few is cheaper than a histogram

}  // namespace

std::int32_t reach(const Histogram& mass, std::uint64_t& need) {
  std::int32_t b = 0;
  while (mass[static_cast<std::size_t>(b)] < need) need -= mass[static_cast<std::size_t>(b++)];
  return b;
}

// Each round spreads the candidates over the bins and goes on with one bin: the highest and the lowest logit
// fall apart, so it ends; where all are equal, they stand in order already.
Candidate completes(std::vector<Candidate>& candidates, std::uint64_t need) {
  while (candidates.size() > kFew) {
    const auto [lowest, highest] = std::minmax_element(candidates.begin(), candidates.end(),
                                                       [](const auto& a, const auto& b) { return a.logit < b.logit; });
    if (lowest->logit == highest->logit) break;
    const Bins bins{highest->logit, static_cast<float>(kBins - 1) / (highest->logit - lowest->logit)};
    if (!std::isfinite(bins.bins_per_logit)) break;
    Histogram mass{};
    for (const Candidate& c : candidates) {
      mass[static_cast<std::size_t>(bin(c.logit, bins))] += static_cast<std::uint64_t>(c.weight);
    }
    const std::int32_t chosen = reach(mass, need);
    std::erase_if(candidates, [&](const Candidate& c) { return bin(c.logit, bins) != chosen; });
  }
  if (!std::is_sorted(candidates.begin(), candidates.end(), preferred)) {
    std::sort(candidates.begin(), candidates.end(), preferred);
  }
  auto at = candidates.begin();
  while (static_cast<std::uint64_t>(at->weight) < need) need -= static_cast<std::uint64_t>((at++)->weight);
  return *at;
}

}  // namespace millrace::sampling

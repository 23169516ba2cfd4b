#include "sampling_draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "sampling_bracket.h"
#include "sampling_cut.h"

namespace millrace::sampling {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

constexpr int kMisses = 4;  // of a bracket

// The least preferred token that survives top-p, and the least weight that survives min-p.
struct Cut {
  float logit;
  std::int32_t id;
  std::int32_t weight;

  // Without branches: which way they would go is a coin's toss.
  bool keeps(const Candidate& c) const {
    const auto tied = static_cast<unsigned>(c.logit == logit) & static_cast<unsigned>(c.id <= id);
    const auto kept = static_cast<unsigned>(c.logit > logit) | tied;
    return (kept & static_cast<unsigned>(c.weight >= weight)) != 0;
  }
};

// A random integer in [0, total).
std::uint64_t below(std::uint64_t total, std::uint64_t bits) {
  __extension__ using Product = unsigned __int128;
  return static_cast<std::uint64_t>(Product{bits} * total >> 64);
}

std::uint64_t top_p_mass(float top_p, std::uint64_t total) {
  return static_cast<std::uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

std::int32_t least_weight(float min_p) { return static_cast<std::int32_t>(std::ceil(min_p * kOne)); }

std::uint64_t sum(const std::vector<Candidate>& candidates) {
  std::uint64_t total = 0;
  for (const Candidate& c : candidates) total += static_cast<std::uint64_t>(c.weight);
  return total;
}

std::int32_t first_highest(const Row& row) {
  std::size_t block = 0;
  while (value(row.block_highest[block]) != row.highest) ++block;
  auto id = static_cast<std::int32_t>(block) * kBlock;
  while (row.logits[id] != row.highest) ++id;
  return id;
}

class DrawFromAll {
 public:
  DrawFromAll(const Row& row, const DrawOptions& options, Scale scale, Workspace& space)
      : row_(row),
        options_(options),
        scale_(scale),
        space_(space),
        mass_(ensure(space.block_mass, blocks(row.vocab))) {}

  std::int32_t run() {
    const Cut cut = find_cut();
    for (const Candidate& c : space_.candidates) {
      mass_[c.id / kBlock] += static_cast<std::uint64_t>(c.weight) * static_cast<std::uint64_t>(cut.keeps(c));
    }
    std::uint64_t total = 0;
    for (std::size_t block = 0; block < blocks(row_.vocab); ++block) total += mass_[block];
    return token_at(cut, below(total, options_.bits));
  }

 private:
  // Leaves in `mass_` what is surely kept of each block, in `candidates` the tokens that the cut decides about.
  Cut find_cut() {
    Cut cut{-kInfinity, row_.vocab, least_weight(options_.min_p)};
    const bool top_p = options_.top_p < 1;
    const Bracket floor = bracket_of_weight(cut.weight, scale_);
    Bracket bracket = top_p ? bracket_of_top_p(row_, scale_, options_.top_p, space_) : floor;
    for (int misses = 0;; ++misses) {
      bracket = {std::max(bracket.low, floor.low), std::max(bracket.high, floor.high)};
      const std::uint64_t total = weigh(bracket, top_p);
      if (!top_p) return cut;
      std::uint64_t above = 0;
      for (std::size_t block = 0; block < blocks(row_.vocab); ++block) above += mass_[block];
      const std::uint64_t need = top_p_mass(options_.top_p, total), inside = sum(space_.candidates);
      // Further with each miss, in the end the whole side.
      const float reach = misses < kMisses ? 8 * (bracket.high - bracket.low) : kInfinity;
      if (need <= above) {
        bracket = {bracket.high, bracket.high + reach};
      } else if (need > above + inside && bracket.low > floor.low) {
        bracket = {bracket.low - reach, bracket.low};
      } else {
        if (need <= above + inside) complete(cut, need - above);
        return cut;
      }
    }
  }

  std::uint64_t weigh(Bracket bracket, bool all) {
    space_.candidates.clear();
    std::uint64_t total = 0;
    for (std::int32_t begin = 0; begin < row_.vocab; begin += kStretch) {
      const std::int32_t block = begin / kBlock, count = std::min(kStretch, row_.vocab - begin);
      const Weighed weighed = row_.passes.weigh_above(row_.logits + begin, count, scale_, row_.block_highest + block,
                                                      bracket, all, mass_ + block, space_.found.data());
      total += weighed.total;
      const std::size_t before = space_.candidates.size();
      space_.candidates.insert(space_.candidates.end(), space_.found.begin(), space_.found.begin() + weighed.found);
      for (std::size_t i = before; i < space_.candidates.size(); ++i) space_.candidates[i].id += begin;
    }
    return total;
  }

  void complete(Cut& cut, std::uint64_t need) {
    space_.consumed = space_.candidates;
    std::erase_if(space_.consumed, [](const Candidate& c) { return c.weight == 0; });
    const Candidate last = completes(space_.consumed, need);
    cut.logit = last.logit;
    cut.id = last.id;
  }

  std::int32_t token_at(const Cut& cut, std::uint64_t target) {
    std::int32_t block = 0;
    while (mass_[block] <= target) target -= mass_[block++];
    const std::int32_t begin = block * kBlock, count = std::min(kBlock, row_.vocab - begin);
    std::int32_t weights[kBlock];
    row_.passes.weigh(row_.logits + begin, count, scale_, weights);
    for (std::int32_t i = 0;; ++i) {
      const Candidate c{row_.logits[begin + i], begin + i, weights[i]};
      const auto mass = cut.keeps(c) ? static_cast<std::uint64_t>(c.weight) : 0;
      if (target < mass) return c.id;
      target -= mass;
    }
  }

  const Row& row_;
  const DrawOptions& options_;
  const Scale scale_;
  Workspace& space_;
  std::uint64_t* mass_;  // by block
};

std::int32_t draw_from_top_k(const Row& row, const DrawOptions& options, Scale scale, Workspace& space) {
  gather_preferred(row, options.top_k, space);
  auto& candidates = space.candidates;
  std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  for (Candidate& c : candidates) c.weight = weight(c.logit, scale);
  std::erase_if(candidates, [](const Candidate& c) { return c.weight == 0; });
  Cut cut{-kInfinity, row.vocab, least_weight(options.min_p)};
  if (options.top_p < 1) {
    space.consumed = candidates;
    const Candidate last = completes(space.consumed, top_p_mass(options.top_p, sum(candidates)));
    cut.logit = last.logit;
    cut.id = last.id;
  }
  std::erase_if(candidates, [&](const Candidate& c) { return !cut.keeps(c); });
  std::uint64_t target = below(sum(candidates), options.bits);
  auto at = candidates.begin();
  while (static_cast<std::uint64_t>(at->weight) <= target) target -= static_cast<std::uint64_t>((at++)->weight);
  return at->id;
}

}  // namespace

std::int32_t choose(const Row& row, const DrawOptions& options, Workspace& space) {
  if (options.temperature == 0) return first_highest(row);
  // Capped, so that the distance 0 stays 0 at temperatures whose reciprocal is infinite.
  const Scale scale{row.highest, std::min(std::numbers::log2e_v<float> / options.temperature, kLargest)};
  const bool top_k = options.top_k > 0 && options.top_k < row.vocab;
  return top_k ? draw_from_top_k(row, options, scale, space) : DrawFromAll(row, options, scale, space).run();
}

}  // namespace millrace::sampling

#include "sampling_bracket.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

namespace millrace::sampling {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLargest = std::numeric_limits<float>::max();

constexpr std::int32_t kSmall = 2048;  // rows so short are searched whole
constexpr std::size_t kPerBlock = 4;   // tokens sampled of each block
constexpr float kHeavy = 128;          // a block whose highest has 1/kHeavy of the mass of all maxima is taken whole
constexpr std::size_t kGroups = 8;     // disjoint parts of the sample
constexpr std::size_t kBins = 128;
constexpr std::size_t kFewBins = 8;
constexpr std::size_t kFew = 32;  // tokens of the sample
constexpr std::size_t kChunk = 64;

using Lanes = std::array<float, kGroups>;
using Histogram = std::array<Lanes, kBins>;

// The tokens to judge a row by: `exact` stand for themselves, `sampled` for the rest of their blocks.
struct Evidence {
  std::vector<float>& exact;
  std::vector<float>& sampled;
  std::vector<std::int32_t>& exact_weights;
  std::vector<std::int32_t>& sampled_weights;
};

void weigh(const Row& row, Scale scale, const std::vector<float>& logits, std::vector<std::int32_t>& weights) {
  row.passes.weigh(logits.data(), static_cast<std::int32_t>(logits.size()), scale, ensure(weights, logits.size()));
}

// The highest of a block stands for itself already: where the sample has it, it is left out once.
void sample_block(const float* from, float highest, float* sampled) {
  std::copy_n(from, kPerBlock, sampled);
  unsigned found = 0;
  for (std::size_t i = 0; i < kPerBlock; ++i) {
    found |= static_cast<unsigned>(std::bit_cast<std::int32_t>(from[i]) == std::bit_cast<std::int32_t>(highest)) << i;
  }
  if (found != 0) sampled[std::countr_zero(found)] = -kInfinity;
}

void collect(const Row& row, Scale scale, const Evidence& evidence) {
  const std::size_t count = blocks(row.vocab);
  auto& [exact, sampled, weights, sampled_weights] = evidence;
  exact.resize(count);
  sampled.assign(count * kPerBlock, -kInfinity);
  for (std::size_t block = 0; block < count; ++block) exact[block] = value(row.block_highest[block]);
  weigh(row, scale, exact, weights);
  float sum = 0;
  for (std::size_t block = 0; block < count; ++block) sum += static_cast<float>(weights[block]);
  for (std::size_t block = 0; block < count; ++block) {
    const float* begin = row.logits + block * kBlock;
    const std::int32_t length = std::min(kBlock, row.vocab - static_cast<std::int32_t>(block) * kBlock);
    if (length < kBlock || static_cast<float>(weights[block]) * kHeavy >= sum) {
      exact[block] = -kInfinity;
      exact.insert(exact.end(), begin, begin + length);
    } else {
      // Not the same places in every block, lest an order of the vocabulary matter.
      const std::size_t place = block * 5 % (kBlock / kPerBlock) * kPerBlock;
      sample_block(begin + place, exact[block], sampled.data() + block * kPerBlock);
    }
  }
  exact.resize((exact.size() + kChunk - 1) / kChunk * kChunk, -kInfinity);
  sampled.resize((sampled.size() + kChunk - 1) / kChunk * kChunk, -kInfinity);
  weigh(row, scale, exact, weights);
  weigh(row, scale, sampled, sampled_weights);
}

// kBins bins of one width from `top` down to `bottom`; the first holds what is above, too, the last what is below.
struct Bins {
  float top;
  float per_logit;

  Bins(float top_logit, float bottom)
      : top(top_logit), per_logit(static_cast<float>(kBins - 1) / (top_logit - bottom)) {}

  bool usable() const { return std::isfinite(per_logit) && per_logit > 0; }
  float edge(float bin) const { return top - bin / per_logit; }

  void add(const std::vector<float>& logits, const std::vector<std::int32_t>& weights, Histogram& mass) const {
    std::array<std::int32_t, kChunk> bin;
    for (std::size_t begin = 0; begin < logits.size(); begin += kChunk) {
      for (std::size_t i = 0; i < kChunk; ++i) {
        const float distance = (top - logits[begin + i]) * per_logit;
        const float clamped = distance < static_cast<float>(kBins - 1) ? distance : static_cast<float>(kBins - 1);
        bin[i] = static_cast<std::int32_t>(clamped > 0 ? clamped : 0);
      }
      for (std::size_t i = 0; i < kChunk; ++i) {
        mass[static_cast<std::size_t>(bin[i])][i % kGroups] += static_cast<float>(weights[begin + i]);
      }
    }
  }
};

Lanes sum(const std::vector<float>& logits, const std::vector<std::int32_t>& weights) {
  Lanes mass{};
  for (std::size_t begin = 0; begin < logits.size(); begin += kGroups) {
    for (std::size_t g = 0; g < kGroups; ++g) mass[g] += static_cast<float>(weights[begin + g]);
  }
  return mass;
}

// Masses of the row, as each group of the sample has it.
Lanes estimates(const Lanes& exact, const Lanes& sampled) {
  float sum = 0;
  for (const float lane : exact) sum += lane;
  Lanes mass;
  for (std::size_t g = 0; g < kGroups; ++g) {
    mass[g] = sum + sampled[g] * static_cast<float>(kGroups * kBlock / kPerBlock);
  }
  return mass;
}

// The first and the last of the bins at which the groups reach the share `top_p` of their mass.
std::array<std::size_t, 2> cuts(const Evidence& evidence, const Bins& bins, const Lanes& need) {
  Histogram exact{}, sampled{};
  bins.add(evidence.exact, evidence.exact_weights, exact);
  bins.add(evidence.sampled, evidence.sampled_weights, sampled);
  std::size_t first = kBins - 1, bin = 0;
  Lanes mass{};
  for (; bin < kBins - 1; ++bin) {
    const Lanes more = estimates(exact[bin], sampled[bin]);
    std::size_t reached = 0;
    for (std::size_t g = 0; g < kGroups; ++g) {
      mass[g] += more[g];
      reached += mass[g] >= need[g] ? 1 : 0;
    }
    if (reached > 0) first = std::min(first, bin);
    if (reached == kGroups) break;
  }
  return {first, bin};
}

}  // namespace

Bracket bracket_of_weight(std::int32_t least, Scale scale) {
  if (least <= 0) return {-kInfinity, -kInfinity};
  constexpr double kError = 1e-5;  // more than that of log2 of a power, its argument's rounding included
  const auto logit = [scale](double weight) {
    const double distance = weight / static_cast<double>(scale.log2_per_logit);
    return static_cast<float>(std::clamp(static_cast<double>(scale.highest) + distance, -kLargest, kLargest));
  };
  const double one = static_cast<double>(kOne);
  return {std::nextafter(logit(std::log2((least - 0.5) / one) - kError), -kInfinity),
          logit(std::log2(least / one) + kError)};
}

// Each group of the sample has an estimate of its own; their range misses the truth about twice in 2^kGroups.
Bracket bracket_of_top_p(const Row& row, Scale scale, float top_p, Workspace& space) {
  if (row.vocab <= kSmall) return {-kInfinity, kInfinity};
  const Evidence evidence{space.exact, space.sampled, space.exact_weights, space.sampled_weights};
  collect(row, scale, evidence);
  Lanes need = estimates(sum(space.exact, space.exact_weights), sum(space.sampled, space.sampled_weights));
  // Tokens lighter than an even share of the rest are never needed: bins below it would be wasted.
  const float most = *std::max_element(need.begin(), need.end());
  const float share = most * (1 - top_p) / static_cast<float>(row.vocab);
  for (float& mass : need) mass *= top_p;
  Bracket bracket{-kInfinity, row.highest};
  float bottom = row.highest - std::clamp(std::log2(kOne / share), 0.1F, 32.0F) / scale.log2_per_logit;
  for (int zoom = 0; zoom < 3; ++zoom) {
    const Bins bins(bracket.high, bottom);
    if (!bins.usable()) break;
    const auto [first, last] = cuts(evidence, bins, need);
    // Room for rounding: tokens at an edge of a bin shall not lie outside.
    if (first > 0) bracket.high = std::nextafter(bins.edge(static_cast<float>(first) - 0.01F), kInfinity);
    if (last < kBins - 1) bracket.low = std::nextafter(bins.edge(static_cast<float>(last) + 1.01F), -kInfinity);
    std::size_t inside = 0;
    for (const float logit : space.sampled) {
      inside += static_cast<std::size_t>(logit > bracket.low) - static_cast<std::size_t>(logit > bracket.high);
    }
    if (last - first >= kFewBins || last == kBins - 1 || inside < kFew) break;
    bottom = bracket.low;
  }
  return bracket;
}

}  // namespace millrace::sampling

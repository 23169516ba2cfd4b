#include "sampling_passes.h"

#include <algorithm>
#include <limits>

namespace millrace::sampling {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

MILLRACE_INLINE KeyRange scan_block(const float* logits, std::int32_t count) {
  KeyRange range{std::numeric_limits<std::int32_t>::max(), std::numeric_limits<std::int32_t>::min()};
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t k = key(logits[i]);
    range.lowest = k < range.lowest ? k : range.lowest;
    range.highest = k > range.highest ? k : range.highest;
  }
  return range;
}

MILLRACE_INLINE KeyRange scan_body(const float* logits, std::int32_t count, std::int32_t* block_highest) {
  KeyRange range{std::numeric_limits<std::int32_t>::max(), std::numeric_limits<std::int32_t>::min()};
  for (std::int32_t begin = 0, block = 0; begin < count; begin += kBlock, ++block) {
    const KeyRange found =
        count - begin >= kBlock ? scan_block(logits + begin, kBlock) : scan_block(logits + begin, count - begin);
    block_highest[block] = found.highest;
    range.lowest = found.lowest < range.lowest ? found.lowest : range.lowest;
    range.highest = found.highest > range.highest ? found.highest : range.highest;
  }
  return range;
}

MILLRACE_INLINE ExpSum sum_exp_body(const float* logits, std::int32_t count, Scale scale) {
  ExpSum sum{0, 0};
  for (std::int32_t i = 0; i < count; ++i) {
    const float scaled = power(logits[i], scale);
    const auto high = static_cast<std::int32_t>(scaled);
    // Exact: above 2^24 a float has no fraction, below it the difference is representable.
    const auto low = static_cast<std::int32_t>((scaled - static_cast<float>(high)) * 16777216.0F);
    sum.high += high;
    sum.low += low;
  }
  return sum;
}

MILLRACE_INLINE void weigh_body(const float* logits, std::int32_t count, Scale scale, std::int32_t* weights) {
  for (std::int32_t i = 0; i < count; ++i) weights[i] = weight(logits[i], scale);
}

// A sum of at most 2^16 weights in lanes no wider than a weight: modulo 2^32, and rounded down.
struct Sum {
  std::uint32_t low = 0;
  std::uint32_t high = 0;  // in units of 2^16

  MILLRACE_INLINE void add(std::int32_t weight) {
    low += static_cast<std::uint32_t>(weight);
    high += static_cast<std::uint32_t>(weight) >> 16;
  }
  MILLRACE_INLINE std::uint64_t value() const {
    const std::uint64_t least = std::uint64_t{high} << 16;
    return least + static_cast<std::uint32_t>(low - static_cast<std::uint32_t>(least));
  }
};

// The sum of the weights of a block.
MILLRACE_INLINE std::uint64_t mass_body(const float* logits, std::int32_t count, Scale scale) {
  Sum sum;
  for (std::int32_t i = 0; i < count; ++i) sum.add(weight(logits[i], scale));
  return sum.value();
}

// Tokens of a block that lie in the bracket into `found`, numbered from `first`; returns how many.
MILLRACE_INLINE std::int32_t gather_body(const float* logits, const std::int32_t* weights, std::int32_t count,
                                         Bracket bracket, std::int32_t first, Candidate* found) {
  alignas(std::uint64_t) std::uint8_t within[kBlock] = {};
  for (std::int32_t i = 0; i < count; ++i) {
    within[i] = static_cast<std::uint8_t>(static_cast<int>(logits[i] > bracket.low) &
                                          static_cast<int>(logits[i] <= bracket.high));
  }
  std::int32_t n = 0;
  for (std::int32_t begin = 0; begin < count; begin += 8) {
    std::uint64_t flags = 0;
    __builtin_memcpy(&flags, within + begin, sizeof(flags));
    for (; flags != 0; flags &= flags - 1) {
      const std::int32_t i = begin + __builtin_ctzll(flags) / 8;
      found[n++] = {logits[i], first + i, weights[i]};
    }
  }
  return n;
}

struct BlockMass {
  std::uint64_t total;
  std::uint64_t above;
};

MILLRACE_INLINE BlockMass split_body(const float* logits, std::int32_t count, Scale scale, float high,
                                     std::int32_t* weights) {
  weigh_body(logits, count, scale, weights);
  Sum total, above;
  for (std::int32_t i = 0; i < count; ++i) {
    total.add(weights[i]);
    above.add(logits[i] > high ? weights[i] : 0);
  }
  return {total.value(), above.value()};
}

// Where the tokens of a block may lie; below 2^-32 every weight rounds to 0.
enum class Part { weightless, below, across };

MILLRACE_INLINE Part part_of(std::int32_t highest_key, Scale scale, Bracket bracket) {
  const float highest = value(highest_key);
  if ((highest - scale.highest) * scale.log2_per_logit < -32.0F) return Part::weightless;
  return highest <= bracket.low ? Part::below : Part::across;
}

MILLRACE_INLINE Weighed weigh_above_body(const float* logits, std::int32_t count, Scale scale,
                                         const std::int32_t* block_highest, Bracket bracket, bool all,
                                         std::uint64_t* block_mass, Candidate* found) {
  std::int32_t weights[kBlock];
  Weighed result{0, 0};
  std::int32_t below = 0;  // tokens just before that lie below the bracket: summed together, they are fewer sums
  for (std::int32_t begin = 0, block = 0; begin < count; begin += kBlock, ++block) {
    block_mass[block] = 0;
    const Part part = part_of(block_highest[block], scale, bracket);
    const float* from = logits + begin;
    const std::int32_t length = std::min(kBlock, count - begin);
    if (part == Part::below && all) {
      below += length;
      continue;
    }
    if (below > 0) result.total += mass_body(from - below, below, scale);
    below = 0;
    if (part != Part::across) continue;
    const bool whole = length == kBlock;
    if (bracket.high == -kInfinity) {
      block_mass[block] = whole ? mass_body(from, kBlock, scale) : mass_body(from, length, scale);
      result.total += block_mass[block];
      continue;
    }
    const BlockMass mass = whole ? split_body(from, kBlock, scale, bracket.high, weights)
                                 : split_body(from, length, scale, bracket.high, weights);
    result.total += mass.total;
    block_mass[block] = mass.above;
    result.found += whole ? gather_body(from, weights, kBlock, bracket, begin, found + result.found)
                          : gather_body(from, weights, length, bracket, begin, found + result.found);
  }
  if (below > 0) result.total += mass_body(logits + count - below, below, scale);
  return result;
}

// The bodies above, compiled for one instruction set.
#define MILLRACE_PASSES(ISA, TARGET)                                                                                  \
  namespace ISA {                                                                                                     \
  TARGET KeyRange scan(const float* logits, std::int32_t count, std::int32_t* block_highest) {                        \
    return scan_body(logits, count, block_highest);                                                                   \
  }                                                                                                                   \
  TARGET ExpSum sum_exp(const float* logits, std::int32_t count, Scale scale) {                                       \
    return sum_exp_body(logits, count, scale);                                                                        \
  }                                                                                                                   \
  TARGET void weigh(const float* logits, std::int32_t count, Scale scale, std::int32_t* weights) {                    \
    weigh_body(logits, count, scale, weights);                                                                        \
  }                                                                                                                   \
  TARGET Weighed weigh_above(const float* logits, std::int32_t count, Scale scale, const std::int32_t* block_highest, \
                             Bracket bracket, bool all, std::uint64_t* block_mass, Candidate* found) {                \
    return weigh_above_body(logits, count, scale, block_highest, bracket, all, block_mass, found);                    \
  }                                                                                                                   \
  constexpr Passes passes{scan, sum_exp, weigh, weigh_above};                                                         \
  }

MILLRACE_PASSES(baseline, )
MILLRACE_PASSES(avx2, [[gnu::target("avx2")]])
MILLRACE_PASSES(avx512, [[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")]])

}  // namespace

const Passes& passes(Isa isa) {
  if (isa >= Isa::avx512) return avx512::passes;
  return isa == Isa::avx2 ? avx2::passes : baseline::passes;
}

}  // namespace millrace::sampling

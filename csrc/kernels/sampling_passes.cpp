#include "sampling_passes.h"

#include <algorithm>
#include <limits>

namespace millrace::sampling {
namespace {

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
    const float power = exp2_nonpositive((logits[i] - scale.highest) * scale.log2_per_logit) * kOne;
    const auto high = static_cast<std::int32_t>(power);
    // Exact: above 2^24 a float has no fraction, below it the difference is representable.
    const auto low = static_cast<std::int32_t>((power - static_cast<float>(high)) * 16777216.0F);
    sum.high += high;
    sum.low += low;
  }
  return sum;
}

MILLRACE_INLINE void weigh_body(const float* logits, std::int32_t count, Scale scale, std::int32_t* weights) {
  for (std::int32_t i = 0; i < count; ++i) weights[i] = weight(logits[i], scale);
}

// A sum of weights in halves, so that it needs no lanes wider than a weight.
struct Halves {
  std::uint32_t low = 0;
  std::uint32_t high = 0;

  MILLRACE_INLINE void add(std::int32_t weight) {
    low += static_cast<std::uint32_t>(weight) & 0xFFFFU;
    high += static_cast<std::uint32_t>(weight) >> 16;
  }
  MILLRACE_INLINE std::uint64_t sum() const { return (std::uint64_t{high} << 16) + low; }
};

MILLRACE_INLINE std::uint64_t weigh_below(const float* logits, std::int32_t count, Scale scale, bool light) {
  if (light) {
    std::uint32_t sum = 0;
    for (std::int32_t i = 0; i < count; ++i) sum += static_cast<std::uint32_t>(weight(logits[i], scale));
    return sum;
  }
  Halves sum;
  for (std::int32_t i = 0; i < count; ++i) sum.add(weight(logits[i], scale));
  return sum.sum();
}

struct BlockWeighed {
  std::uint64_t total;
  std::uint64_t above;
  std::int32_t found;
};

MILLRACE_INLINE BlockWeighed weigh_across(const float* logits, std::int32_t count, Scale scale, Bracket bracket,
                                          std::int32_t first, Candidate* found) {
  constexpr std::int32_t kFlags = sizeof(std::uint64_t);
  std::int32_t weights[kBlock];
  std::uint8_t within[kBlock] = {};
  Halves total, above;
  std::uint32_t inside = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t w = weight(logits[i], scale);
    weights[i] = w;
    total.add(w);
    above.add(logits[i] > bracket.high ? w : 0);
    inside +=
        static_cast<std::uint32_t>(logits[i] > bracket.low) - static_cast<std::uint32_t>(logits[i] > bracket.high);
  }
  std::int32_t n = 0;
  if (inside > 0) {
    for (std::int32_t i = 0; i < count; ++i) {
      within[i] = static_cast<std::uint8_t>(static_cast<int>(logits[i] > bracket.low) &
                                            static_cast<int>(logits[i] <= bracket.high));
    }
    for (std::int32_t begin = 0; begin < count; begin += kFlags) {
      std::uint64_t flags = 0;
      __builtin_memcpy(&flags, within + begin, sizeof(flags));
      for (; flags != 0; flags &= flags - 1) {
        const std::int32_t i = begin + __builtin_ctzll(flags) / 8;
        found[n++] = {logits[i], first + i, weights[i]};
      }
    }
  }
  return {total.sum(), above.sum(), n};
}

MILLRACE_INLINE Weighed weigh_above_body(const float* logits, std::int32_t count, Scale scale,
                                         const std::int32_t* block_highest, Bracket bracket, bool all,
                                         std::uint64_t* block_mass, Candidate* found) {
  Weighed result{0, 0};
  for (std::int32_t begin = 0, block = 0; begin < count; begin += kBlock, ++block) {
    const float highest = value(block_highest[block]);
    const float log2 = (highest - scale.highest) * scale.log2_per_logit;
    block_mass[block] = 0;
    const bool below = highest <= bracket.low;
    // Below 2^-32 every weight rounds to 0.
    if (log2 < -32.0F || (below && !all)) continue;
    const std::int32_t length = std::min(kBlock, count - begin);
    if (below) {
      // kBlock weights of 2^24 fit.
      const bool light = log2 < -6.0F;
      result.total += length == kBlock ? weigh_below(logits + begin, kBlock, scale, light)
                                       : weigh_below(logits + begin, length, scale, light);
      continue;
    }
    const BlockWeighed weighed =
        length == kBlock ? weigh_across(logits + begin, kBlock, scale, bracket, begin, found + result.found)
                         : weigh_across(logits + begin, length, scale, bracket, begin, found + result.found);
    block_mass[block] = weighed.above;
    result.total += weighed.total;
    result.found += weighed.found;
  }
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

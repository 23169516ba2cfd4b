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

MILLRACE_INLINE std::uint64_t weigh_block(const float* logits, std::int32_t count, Scale scale, std::int32_t* weights) {
  std::uint64_t mass = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    weights[i] = weight(logits[i], scale);
    mass += static_cast<std::uint64_t>(weights[i]);
  }
  return mass;
}

MILLRACE_INLINE std::uint64_t weigh_body(const float* logits, std::int32_t count, Scale scale,
                                         const std::int32_t* block_highest, std::int32_t* weights,
                                         std::uint64_t* block_mass) {
  std::uint64_t total = 0;
  for (std::int32_t begin = 0, block = 0; begin < count; begin += kBlock, ++block) {
    // Below 2^-32 every weight rounds to 0.
    const bool empty = (value(block_highest[block]) - scale.highest) * scale.log2_per_logit < -32.0F;
    const std::int32_t length = std::min(kBlock, count - begin);
    block_mass[block] = empty              ? 0
                        : length == kBlock ? weigh_block(logits + begin, kBlock, scale, weights + begin)
                                           : weigh_block(logits + begin, length, scale, weights + begin);
    total += block_mass[block];
  }
  return total;
}

// Four tables, so that equal bins in a row do not wait for one another's store.
MILLRACE_INLINE void histogram_body(const float* logits, const std::int32_t* weights, std::int32_t count,
                                    const std::uint64_t* block_mass, Bins bins, std::uint8_t* bin_of, Histogram& mass) {
  std::array<Histogram, 4> tables{};
  for (std::int32_t begin = 0, block = 0; begin < count; begin += kBlock, ++block) {
    if (block_mass[block] == 0) continue;
    const std::int32_t end = std::min(begin + kBlock, count);
    for (std::int32_t i = begin; i < end; ++i) bin_of[i] = static_cast<std::uint8_t>(bin(logits[i], bins));
    for (std::int32_t i = begin; i < end; ++i) {
      tables[static_cast<std::size_t>(i) % 4][bin_of[i]] += static_cast<std::uint64_t>(weights[i]);
    }
  }
  for (std::size_t b = 0; b < kBins; ++b) mass[b] = tables[0][b] + tables[1][b] + tables[2][b] + tables[3][b];
}

MILLRACE_INLINE std::uint64_t keep_body(const float* logits, std::int32_t count, Cut cut, std::int32_t* weights,
                                        std::uint64_t* block_mass) {
  std::uint64_t total = 0;
  for (std::int32_t begin = 0, block = 0; begin < count; begin += kBlock, ++block) {
    if (block_mass[block] == 0) continue;
    std::uint64_t mass = 0;
    for (std::int32_t i = begin, end = std::min(begin + kBlock, count); i < end; ++i) {
      const bool kept = (static_cast<int>(logits[i] > cut.logit) |
                         (static_cast<int>(logits[i] == cut.logit) & static_cast<int>(i <= cut.id))) != 0;
      const std::int32_t w = weights[i] >= cut.weight ? weights[i] : 0;
      weights[i] = kept ? w : 0;
      mass += static_cast<std::uint64_t>(weights[i]);
    }
    block_mass[block] = mass;
    total += mass;
  }
  return total;
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
  TARGET std::uint64_t weigh(const float* logits, std::int32_t count, Scale scale, const std::int32_t* block_highest, \
                             std::int32_t* weights, std::uint64_t* block_mass) {                                      \
    return weigh_body(logits, count, scale, block_highest, weights, block_mass);                                      \
  }                                                                                                                   \
  TARGET void histogram(const float* logits, const std::int32_t* weights, std::int32_t count,                         \
                        const std::uint64_t* block_mass, Bins bins, std::uint8_t* bin_of, Histogram& mass) {          \
    histogram_body(logits, weights, count, block_mass, bins, bin_of, mass);                                           \
  }                                                                                                                   \
  TARGET std::uint64_t keep(const float* logits, std::int32_t count, Cut cut, std::int32_t* weights,                  \
                            std::uint64_t* block_mass) {                                                              \
    return keep_body(logits, count, cut, weights, block_mass);                                                        \
  }                                                                                                                   \
  constexpr Passes passes{scan, sum_exp, weigh, histogram, keep};                                                     \
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

// The passes of the sampler that read a whole row, compiled once for each instruction set.
//
// Every reduction is a sum or a maximum of integers, so it has one result in any order and on any vector width.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "millrace/isa.h"

namespace millrace::sampling {

inline constexpr std::int32_t kBlock = 128;            // tokens that are skipped, summed or searched together
inline constexpr std::int32_t kStretch = 64 * kBlock;  // tokens of one call of `Passes::weigh_above`
inline constexpr float kOne = 1073741824.0F;           // 2^30: the weight of the most likely token

// Order-preserving integers: key(a) < key(b) exactly if a < b, -0 just below +0; NaN lies outside [-inf, inf].
struct KeyRange {
  std::int32_t lowest;
  std::int32_t highest;
};

// Weights are exp(scaled distance from the maximum) in units of 2^-30 of the most likely token's.
struct Scale {
  float highest;         // the largest logit
  float log2_per_logit;  // log2(e) / temperature
};

// exp sums at full float precision: high * 2^-30 + low * 2^-54.
struct ExpSum {
  std::int64_t high;
  std::int64_t low;
};

// The logits in (low, high].
struct Bracket {
  float low;
  float high;
};

struct Candidate {
  float logit;
  std::int32_t id;
  std::int32_t weight;
};

struct Weighed {
  std::uint64_t total;  // of all tokens
  std::int32_t found;   // tokens in the bracket
};

struct Passes {
  // Keys of the row, and of each block its highest.
  KeyRange (*scan)(const float* logits, std::int32_t count, std::int32_t* block_highest);
  ExpSum (*sum_exp)(const float* logits, std::int32_t count, Scale scale);
  void (*weigh)(const float* logits, std::int32_t count, Scale scale, std::int32_t* weights);
  // Of at most kStretch tokens: by block the sum of the weights above the bracket, and the tokens within it in
  // ascending order, numbered from 0, into the kStretch places of `found`. With `all` false, `total` may lack blocks
  // that have no token above the bracket's lower end.
  Weighed (*weigh_above)(const float* logits, std::int32_t count, Scale scale, const std::int32_t* block_highest,
                         Bracket bracket, bool all, std::uint64_t* block_mass, Candidate* found);
};

const Passes& passes(Isa isa);

// Inlined into each instruction set's passes: an ordinary inline function would be compiled for the baseline.
#define MILLRACE_INLINE [[gnu::always_inline]] inline

MILLRACE_INLINE std::int32_t key(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

MILLRACE_INLINE float value(std::int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// exp(scaled distance from the maximum) * kOne: 2^(30 - t) for t >= 0, relative error below 2e-7, exactly kOne at 0;
// anything beyond 100 is 100. With n the integer nearest to t, 2^(30 - t) = 2^-n 2^30 2^f, and 1 + f q(f) has the least
// maximal relative error over |f| <= 1/2. Its factor 2^30, and the change of sign, round nothing.
MILLRACE_INLINE float power(float logit, Scale scale) {
  const auto bits = std::bit_cast<std::int32_t>((scale.highest - logit) * scale.log2_per_logit);
  // As integers: compilers make one instruction of it, which they do not of floats.
  const float t = std::bit_cast<float>(std::min(bits, std::bit_cast<std::int32_t>(100.0F)));
  const auto n = static_cast<std::int32_t>(t + 0.5F);
  const float f = static_cast<float>(n) - t;
  float p = 0x1.5bba14p-10F * kOne;
  p = p * f + 0x1.3cea88p-7F * kOne;
  p = p * f + 0x1.c6b752p-5F * kOne;
  p = p * f + 0x1.ebf9bcp-3F * kOne;
  p = p * f + 0x1.62e42ap-1F * kOne;
  p = p * f + kOne;
  return std::bit_cast<float>(std::bit_cast<std::int32_t>(p) - (n << 23));
}

MILLRACE_INLINE std::int32_t weight(float logit, Scale scale) {
  return static_cast<std::int32_t>(power(logit, scale) + 0.5F);
}

}  // namespace millrace::sampling

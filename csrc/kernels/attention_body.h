// Attention in the vectors of simd_*.h and the products (Weight, store_weights, multiply) of the instruction set, which
// are included before.
//
// Keys and values are panels [steps][16 columns][2] of bf16: for scores, a step is a pair of dims and a column a token;
// for mixing, a step is a pair of tokens and a column a dim.
#pragma once

#include "attention_kernels.h"
#include "attention_span.h"
#include "simd_math.h"

namespace millrace {
namespace {

constexpr float kNothing = -__builtin_huge_valf();  // the highest of no scores

template <std::int32_t R, std::int32_t C>
[[gnu::always_inline]] inline void clear(F32 (&sums)[R][C]) {
#pragma GCC unroll 8
  for (std::int32_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C; ++c) sums[r][c] = zero();
  }
}

template <std::int32_t R, std::int32_t C>
[[gnu::always_inline]] inline void store_rows(const F32 (&sums)[R][C], float* out) {
#pragma GCC unroll 8
  for (std::int32_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C; ++c) store(out + r * kSpan + c * kLanes, sums[r][c]);
  }
}

// Dot products of R queries with the keys of C panels.
template <std::int32_t R, std::int32_t C>
void score(const Weight* queries, const Span& span, std::int32_t half, std::int32_t steps, float* out) {
  const std::uint32_t *panels[C], *after[C];
#pragma GCC unroll 8
  for (std::int32_t c = 0; c < C; ++c) {
    panels[c] = span.keys[half + c];
    after[c] = span.after_keys[half + c];
  }
  F32 sums[R][C * kVectors];
  clear(sums);
  multiply<R, C>(sums, queries, panels, after, steps);
  store_rows(sums, out);
}

// R weighted sums of values: some pairs of tokens of a span, the dims of C panels.
template <std::int32_t R, std::int32_t C>
void mix(const Weight* weights, const Span& span, Range pairs, std::int32_t panel, float* out) {
  F32 sums[R][C * kVectors];
  clear(sums);
  for (std::int32_t pair = pairs.begin; pair < pairs.end;) {
    const std::int32_t block = pair / kPairs;
    const std::int32_t end = (block + 1) * kPairs < pairs.end ? (block + 1) * kPairs : pairs.end;
    const std::uint32_t *panels[C], *after[C];
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < C; ++c) {
      const std::int32_t at = ((panel + c) * kPairs + pair % kPairs) * kPanel;
      panels[c] = span.values[block] + at;
      after[c] = span.after_values[block] + at;
    }
    multiply<R, C>(sums, weights + 2 * pair, panels, after, end - pair);
    pair = end;
  }
  store_rows(sums, out);
}

constexpr std::int32_t at_most(std::int32_t panels) { return panels < kPanels ? panels : kPanels; }

template <std::int32_t R>
void score_rows(const Weight* queries, const Span& span, Range halves, std::int32_t steps, float* out) {
  using Score = void (*)(const Weight*, const Span&, std::int32_t, std::int32_t, float*);
  constexpr Score kScore[] = {score<R, 1>, score<R, at_most(2)>, score<R, at_most(3)>, score<R, at_most(4)>};
  for (std::int32_t half = halves.begin; half < halves.end; half += kPanels) {
    const std::int32_t panels = at_most(halves.end - half);
    kScore[panels - 1](queries, span, half, steps, out + half * kPanel);
  }
}

template <std::int32_t R>
void mix_rows(const Weight* weights, const Span& span, Range pairs, std::int32_t panels, float* out) {
  using Mix = void (*)(const Weight*, const Span&, Range, std::int32_t, float*);
  constexpr Mix kMix[] = {mix<R, 1>, mix<R, at_most(2)>, mix<R, at_most(3)>, mix<R, at_most(4)>};
  const std::int32_t passes = (panels + kPanels - 1) / kPanels;
  const std::int32_t width = (panels + passes - 1) / passes;
  for (std::int32_t panel = 0; panel < panels; panel += width) {
    const std::int32_t count = panels - panel < width ? panels - panel : width;
    kMix[count - 1](weights, span, pairs, panel, out + panel * kPanel);
  }
}

using ScoreRows = void (*)(const Weight*, const Span&, Range, std::int32_t, float*);
using MixRows = void (*)(const Weight*, const Span&, Range, std::int32_t, float*);
constexpr ScoreRows kScoreRows[] = {score_rows<1>, score_rows<2>, score_rows<3>,
                                    score_rows<4>, score_rows<5>, score_rows<6>};
constexpr MixRows kMixRows[] = {mix_rows<1>, mix_rows<2>, mix_rows<3>, mix_rows<4>, mix_rows<5>, mix_rows<6>};
static_assert(kTogether == 6);

alignas(64) constexpr float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// x where `seen` holds position first + lane, `other` elsewhere.
inline F32 where_seen(Range seen, std::int32_t first, F32 x, F32 other) {
  if (seen.begin <= first && first + kLanes <= seen.end) return x;
  const F32 position = load(kIota) + fill(static_cast<float>(first));
  const F32 early = where_less(position, fill(static_cast<float>(seen.begin)), other, x);
  return where_less(position, fill(static_cast<float>(seen.end)), early, other);
}

inline F32 scales_at(const float* const* scales, std::int32_t position) {
  return load(scales[position / kPanel] + position % kPanel);
}

// Asks for a block, a part of it at each of `steps`; null: for nothing.
class Trickle {
 public:
  Trickle(const std::byte* block, std::int64_t bytes, std::int32_t steps)
      : at_(block), end_(block == nullptr ? nullptr : block + bytes), step_(block == nullptr ? 0 : bytes / steps) {}

  void ask() {
    for (const std::byte* stop = at_ + step_; at_ < stop && at_ < end_; at_ += 64) prefetch(at_);
  }

 private:
  const std::byte *at_, *end_;
  std::int64_t step_;
};

// Turns the products of one query into weights of values, at positions `computed` (multiples of 16) of a span, of which
// it sees those of `seen`; the others weigh nothing.
inline Softmax softmax(float* scores, Weight* weights, const Span& span, Range computed, Range seen, float scale,
                       Trickle ahead) {
  F32 highest = fill(kNothing);
  for (std::int32_t i = computed.begin; i < computed.end; i += kLanes) {
    ahead.ask();
    F32 x = load(scores + i) * fill(scale);
    if (span.scaled) x = x * scales_at(span.key_scales, i);
    x = where_seen(seen, i, x, fill(kNothing));
    store(scores + i, x);
    highest = max(highest, x);
  }
  const float most = maximum(highest);
  F32 total = zero();
  for (std::int32_t i = computed.begin; i < computed.end; i += kLanes) {
    ahead.ask();
    const F32 x = exp(load(scores + i) - fill(most));
    total = total + x;
    if (span.scaled) {
      store_weights(weights + i, where_seen(seen, i, x * scales_at(span.value_scales, i), zero()));
    } else {
      store_weights(weights + i, x);
    }
  }
  return {most, sum(total)};
}

inline void store_part(float* out, const float* part, Softmax of_part, std::int32_t dim) {
  for (std::int32_t d = 0; d < dim; d += kLanes) store(out + d, load(part + d));
  out[dim] = of_part.highest;
  out[dim + 1] = of_part.sum;
}

// state = state + part, both relative to their highest scores.
inline void add_part(float* mixed, Softmax& state, const float* part, Softmax of_part, std::int32_t dim) {
  if (of_part.highest == kNothing) return;
  if (state.highest == kNothing) {
    for (std::int32_t d = 0; d < dim; d += kLanes) store(mixed + d, load(part + d));
    state = of_part;
    return;
  }
  const F32 before = fill(state.highest), added = fill(of_part.highest);
  const F32 highest = max(before, added);
  const F32 keep = exp(before - highest), take = exp(added - highest);
  for (std::int32_t d = 0; d < dim; d += kLanes) store(mixed + d, fma(load(mixed + d), keep, load(part + d) * take));
  alignas(64) float sums[kLanes], most[kLanes];
  store(sums, fma(fill(state.sum), keep, fill(of_part.sum) * take));
  store(most, highest);
  state = {most[0], sums[0]};
}

// Out of a tile's query: the output of its token and head.
inline void finish(const AttentionInput& input, std::int32_t row, std::int32_t kv_head, std::int32_t query,
                   const float* mixed, float total) {
  const std::int32_t group = input.heads / input.cache.kv_heads, dim = input.cache.head_dim;
  const std::int64_t token = input.offsets[row] + query / group;
  float* out = input.out + token * input.out_stride + std::int64_t{kv_head * group + query % group} * dim;
  std::int32_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(mixed + d) / fill(total));
  if (d < dim) store(out + d, load(mixed + d, dim - d) / fill(total), dim - d);
}

// Rounds the queries of a tile to what is multiplied: rows of kSpan, padding zero. Asks for the memory of the output,
// and for the queries of the next head.
inline void load_queries(const AttentionInput& input, const AttentionItem& item, std::int32_t kv_head, Weight* out) {
  const std::int32_t group = input.heads / input.cache.kv_heads, dim = input.cache.head_dim;
  for (std::int32_t i = 0; i < item.queries; ++i) {
    const std::int32_t query = item.first_query + i;
    const std::int64_t token = input.offsets[item.row] + query / group;
    const std::int64_t column = std::int64_t{kv_head * group + query % group} * dim;
    const float* q = input.q + token * input.q_stride + column;
    Weight* row = out + i * kSpan;
    std::int32_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store_rounded(row + d, load(q + d));
    if (d < dim) store_rounded(row + d, load(q + d, dim - d));
    for (d = (dim + kLanes - 1) / kLanes * kLanes; d < padded_dim(dim); d += kLanes) store_rounded(row + d, zero());
    for (d = 0; d < dim; d += 16) {
      prefetch(input.out + token * input.out_stride + column + d);
      if (kv_head + 1 < item.heads.end) prefetch(q + group * dim + d);
    }
  }
}

// Parts of queries [first, first + count) of the item, kTogether at most, over one span: into scratch.part and
// `of_part`.
inline void attend_rows(const AttentionInput& input, const AttentionItem& item, std::int32_t first, std::int32_t count,
                        std::int32_t span_index, const Span& span, AttentionScratch& scratch, Softmax* of_part) {
  const auto seen = [&](std::int32_t from, std::int32_t to) {
    return seen_of(input, item.row, item.first_query + from, item.first_query + to, span_index);
  };
  for (std::int32_t i = 0; i < count; ++i) of_part[i] = {kNothing, 0.0F};
  const Range used = seen(first, first + count - 1);
  if (used.end <= used.begin) return;

  const std::int32_t dim = padded_dim(input.cache.head_dim);
  const Range halves{used.begin / kPanel, (used.end + kPanel - 1) / kPanel};
  const Range computed{halves.begin * kPanel, halves.end * kPanel};
  const auto* queries = reinterpret_cast<const Weight*>(scratch.queries) + first * kSpan;
  auto* weights = reinterpret_cast<Weight*>(scratch.weights);
  kScoreRows[count - 1](queries, span, halves, dim / 2, scratch.scores[0]);
  const std::int32_t steps = 2 * (computed.end - computed.begin) / kLanes;
  for (std::int32_t i = 0; i < count; ++i) {
    const Trickle ahead(first == 0 ? span.while_weighing[i] : nullptr, span.block_bytes, steps);
    of_part[i] =
        softmax(scratch.scores[i], weights + i * kSpan, span, computed, seen(first + i, first + i), input.scale, ahead);
  }
  kMixRows[count - 1](weights, span, {used.begin / 2, (used.end + 1) / 2}, dim / kPanel, scratch.part[0]);
}

inline void attend_tile(const AttentionInput& input, const AttentionItem& item, std::int32_t kv_head, float* parts,
                        AttentionScratch& scratch) {
  const std::int32_t dim = padded_dim(input.cache.head_dim), stride = part_floats(input.cache.head_dim);
  load_queries(input, item, kv_head, reinterpret_cast<Weight*>(scratch.queries));
  for (std::int32_t i = 0; i < item.queries; ++i) scratch.state[i] = {kNothing, 0.0F};
  const std::int32_t passes = (item.queries + kTogether - 1) / kTogether;
  const std::int32_t together = (item.queries + passes - 1) / passes;

  Blocks blocks = find(input, item, kv_head, item.spans.begin);
  for (std::int32_t s = item.spans.begin; s < item.spans.end; ++s) {
    const Blocks next = find_next(input, item, kv_head, s);
    Span span;
    open_span(input, blocks, next, together < item.queries ? together : item.queries, span, scratch);
    blocks = next;
    for (std::int32_t first = 0; first < item.queries; first += together) {
      const std::int32_t count = together < item.queries - first ? together : item.queries - first;
      Softmax of_part[kTogether];
      attend_rows(input, item, first, count, s, span, scratch, of_part);
      for (std::int32_t i = 0; i < count; ++i) {
        if (item.part == kWhole) {
          add_part(scratch.mixed[first + i], scratch.state[first + i], scratch.part[i], of_part[i], dim);
        } else {
          store_part(parts + item.part + ((s - item.spans.begin) * std::int64_t{item.queries} + first + i) * stride,
                     scratch.part[i], of_part[i], dim);
        }
      }
    }
  }
  if (item.part != kWhole) return;
  for (std::int32_t i = 0; i < item.queries; ++i) {
    finish(input, item.row, kv_head, item.first_query + i, scratch.mixed[i], scratch.state[i].sum);
  }
}

void attend_item(const AttentionInput& input, const AttentionItem& item, float* parts, AttentionScratch& scratch) {
  for (std::int32_t head = item.heads.begin; head < item.heads.end; ++head) {
    attend_tile(input, item, head, parts, scratch);
  }
}

void merge_parts(const AttentionInput& input, const AttentionMerge& merge, const float* parts) {
  const std::int32_t dim = padded_dim(input.cache.head_dim), stride = part_floats(input.cache.head_dim);
  alignas(64) float mixed[kMaxHeadDim];
  for (std::int32_t i = 0; i < merge.queries; ++i) {
    Softmax state{kNothing, 0.0F};
    for (std::int32_t s = 0; s < merge.spans; ++s) {
      const float* part = parts + merge.part + (s * std::int64_t{merge.queries} + i) * stride;
      add_part(mixed, state, part, {part[dim], part[dim + 1]}, dim);
    }
    finish(input, merge.row, merge.head, merge.first_query + i, mixed, state.sum);
  }
}

}  // namespace
}  // namespace millrace

#include "millrace/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include "millrace/philox.h"
#include "sampling_cut.h"
#include "sampling_passes.h"

namespace millrace {
namespace {

using sampling::Candidate;
using sampling::Cut;
using sampling::kBins;
using sampling::kBlock;
using sampling::KeyRange;
using sampling::Passes;
using sampling::Scale;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr std::uint32_t kSeen = 1U << 31;

template <typename T>
T* ensure(std::vector<T>& buffer, std::size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Buffers that outlive a call: allocating them anew would cost more page faults than the sampling itself.
struct Workspace {
  std::vector<float> logits;
  std::vector<std::int32_t> weights;
  std::vector<std::uint32_t> occurrences;  // all 0 between rows
  std::vector<std::int32_t> block_highest;
  std::vector<std::uint64_t> block_mass;
  std::vector<std::uint8_t> bin_of;
  std::vector<std::int32_t> thresholds;
  std::vector<Candidate> candidates;
};

class RowSampler {
 public:
  RowSampler(const SamplingInput& input, const SamplingOutput& output, std::int32_t row, const Passes& passes,
             Workspace& space)
      : in_(input),
        out_(output),
        row_(row),
        vocab_(input.vocab),
        passes_(passes),
        space_(space),
        logits_(input.logits + row * input.row_stride) {}

  void run() {
    out_.token_ids[row_] = -1;
    out_.logprobs[row_] = std::numeric_limits<float>::quiet_NaN();
    SamplingStatus& status = out_.status[row_];
    status = scan();
    if (status != SamplingStatus::ok) return;
    const float* raw = logits_;
    const float raw_highest = highest_;
    if (in_.top_n[row_] >= 0) sort_most_likely(in_.top_n[row_]);
    if (process()) status = scan();
    if (status != SamplingStatus::ok) return;
    const std::int32_t token = choose();
    out_.token_ids[row_] = token;
    if (in_.top_n[row_] >= 0) write_logprobs(raw, raw_highest, token);
  }

 private:
  SamplingStatus scan() {
    const KeyRange range = passes_.scan(logits_, vocab_, ensure(space_.block_highest, blocks()));
    const bool finite = sampling::key(-kInfinity) <= range.lowest && range.highest < sampling::key(kInfinity);
    if (!finite) return SamplingStatus::not_finite;
    highest_ = sampling::value(range.highest);
    return highest_ == -kInfinity ? SamplingStatus::no_token : SamplingStatus::ok;
  }

  // Logit bias, penalties and mask, on a copy of the row; false if there are none.
  bool process() {
    const bool penalised = in_.repetition_penalty[row_] != 1.0F || in_.presence_penalty[row_] != 0.0F ||
                           in_.frequency_penalty[row_] != 0.0F;
    const std::int32_t first = in_.bias_offsets[row_], last = in_.bias_offsets[row_ + 1];
    const std::uint32_t* mask = in_.masks[row_];
    if (!penalised && first == last && mask == nullptr) return false;
    float* copy = ensure(space_.logits, static_cast<std::size_t>(vocab_));
    std::copy_n(logits_, vocab_, copy);
    for (std::int32_t i = first; i < last; ++i) copy[in_.bias_ids[i]] += in_.bias_values[i];
    if (penalised) penalise(copy);
    if (mask != nullptr) apply_mask(copy, mask);
    logits_ = copy;
    return true;
  }

  void penalise(float* logits) {
    const float repetition = in_.repetition_penalty[row_];
    const float presence = in_.presence_penalty[row_], frequency = in_.frequency_penalty[row_];
    const std::int32_t* history = in_.history_ids + in_.history_offsets[row_];
    const std::int32_t length = in_.history_offsets[row_ + 1] - in_.history_offsets[row_];
    std::uint32_t* occurrences = ensure(space_.occurrences, static_cast<std::size_t>(vocab_));
    for (std::int32_t i = 0; i < length; ++i) {
      std::uint32_t& n = occurrences[history[i]];
      n = (n | kSeen) + (i >= in_.history_prompt_lens[row_] ? 1U : 0U);
    }
    for (std::int32_t i = 0; i < length; ++i) {
      std::uint32_t& n = occurrences[history[i]];
      if (n == 0) continue;  // its first occurrence has settled it
      float& z = logits[history[i]];
      z = z > 0 ? z / repetition : z * repetition;
      const std::uint32_t in_output = n & ~kSeen;
      if (in_output > 0) z = (z - frequency * static_cast<float>(in_output)) - presence;
      n = 0;
    }
  }

  void apply_mask(float* logits, const std::uint32_t* mask) const {
    for (std::int32_t begin = 0; begin < vocab_; begin += 32) {
      const std::uint32_t word = mask[begin / 32];
      if (word == ~0U) continue;
      for (std::int32_t i = begin, end = std::min(begin + 32, vocab_); i < end; ++i) {
        if ((word >> (i - begin) & 1U) == 0) logits[i] = -kInfinity;
      }
    }
  }

  std::int32_t choose() {
    const float temperature = in_.temperature[row_];
    if (temperature == 0) return first_highest();
    // Capped, so that the distance 0 stays 0 at temperatures whose reciprocal is infinite.
    scale_ = {highest_, std::min(std::numbers::log2e_v<float> / temperature, kLargest)};
    const std::int32_t top_k = in_.top_k[row_];
    return top_k > 0 && top_k < vocab_ ? draw_from_top_k(top_k) : draw_from_all();
  }

  std::int32_t first_highest() const {
    std::size_t block = 0;
    while (sampling::value(space_.block_highest[block]) != highest_) ++block;
    auto id = static_cast<std::int32_t>(block) * kBlock;
    while (logits_[id] != highest_) ++id;
    return id;
  }

  std::int32_t draw_from_all() {
    std::int32_t* weights = ensure(space_.weights, static_cast<std::size_t>(vocab_));
    std::uint64_t* mass = ensure(space_.block_mass, blocks());
    std::uint64_t total = passes_.weigh(logits_, vocab_, scale_, space_.block_highest.data(), weights, mass);
    Cut cut{-kInfinity, vocab_, least_weight()};
    if (in_.top_p[row_] < 1) {
      const Candidate last = complete_top_p(total);
      cut.logit = last.logit;
      cut.id = last.id;
    }
    if (cut.weight > 0 || cut.logit > -kInfinity) total = passes_.keep(logits_, vocab_, cut, weights, mass);
    std::uint64_t target = draw(total);
    std::size_t block = 0;
    while (mass[block] <= target) target -= mass[block++];
    auto id = static_cast<std::int32_t>(block) * kBlock;
    while (static_cast<std::uint64_t>(weights[id]) <= target) target -= static_cast<std::uint64_t>(weights[id++]);
    return id;
  }

  // The least likely token of the top-p set of the whole row: a histogram finds its neighbours.
  Candidate complete_top_p(std::uint64_t total) {
    const std::int32_t* weights = space_.weights.data();
    std::uint64_t need = top_p_mass(total);
    // Tokens lighter than an even share of the rest are never needed: bins below it would be wasted.
    const double share = static_cast<double>(total - need + 1) / static_cast<double>(vocab_);
    const double depth = std::clamp(std::log2(static_cast<double>(sampling::kOne) / share), 0.01, 32.0);
    const float bins_per_log2 = static_cast<float>(kBins - 1) / static_cast<float>(depth);
    // Capped as the scale is.
    const sampling::Bins bins{highest_, std::min(bins_per_log2 * scale_.log2_per_logit, kLargest)};
    std::uint8_t* bin_of = ensure(space_.bin_of, static_cast<std::size_t>(vocab_));
    sampling::Histogram mass;
    passes_.histogram(logits_, weights, vocab_, space_.block_mass.data(), bins, bin_of, mass);
    gather_bin(static_cast<std::uint8_t>(sampling::reach(mass, need)));
    return sampling::completes(space_.candidates, need);
  }

  // The tokens of one bin that have mass, in ascending order, into `candidates`.
  void gather_bin(std::uint8_t chosen) {
    constexpr std::int32_t kStretch = 32;
    space_.candidates.clear();
    for (std::int32_t begin = 0; begin < vocab_; begin += kStretch) {
      if (space_.block_mass[static_cast<std::size_t>(begin / kBlock)] == 0) continue;
      const std::uint8_t* bins = space_.bin_of.data() + begin;
      const std::int32_t length = std::min(kStretch, vocab_ - begin);
      std::uint8_t found = 0;
      for (std::int32_t i = 0; i < length; ++i) found |= static_cast<std::uint8_t>(bins[i] == chosen);
      for (std::int32_t i = 0; found != 0 && i < length; ++i) {
        const std::int32_t id = begin + i, w = space_.weights[static_cast<std::size_t>(id)];
        if (bins[i] == chosen && w > 0) space_.candidates.push_back({logits_[id], id, w});
      }
    }
  }

  std::int32_t draw_from_top_k(std::int32_t top_k) {
    gather_preferred(top_k);
    auto& candidates = space_.candidates;
    std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
    for (Candidate& c : candidates) c.weight = sampling::weight(c.logit, scale_);
    keep_if([](const Candidate& c) { return c.weight > 0; });
    if (in_.top_p[row_] < 1) {
      std::vector<Candidate> consumed = candidates;
      const Candidate last = sampling::completes(consumed, top_p_mass(sum(candidates)));
      keep_if([&](const Candidate& c) { return !sampling::preferred(last, c); });
    }
    keep_if([least = least_weight()](const Candidate& c) { return c.weight >= least; });
    std::uint64_t target = draw(sum(candidates));
    auto at = candidates.begin();
    while (static_cast<std::uint64_t>(at->weight) <= target) target -= static_cast<std::uint64_t>((at++)->weight);
    return at->id;
  }

  // The `count` preferred tokens, in any order, into `candidates`; 0 < count <= V.
  void gather_preferred(std::int32_t count) {
    auto& candidates = space_.candidates;
    candidates.clear();
    const float least = bound_of_preferred(count);
    for (std::int32_t begin = 0, block = 0; begin < vocab_; begin += kBlock, ++block) {
      if (sampling::value(space_.block_highest[static_cast<std::size_t>(block)]) < least) continue;
      for (std::int32_t id = begin, end = std::min(begin + kBlock, vocab_); id < end; ++id) {
        if (logits_[id] >= least) candidates.push_back({logits_[id], id, 0});
      }
    }
    std::nth_element(candidates.begin(), candidates.begin() + (count - 1), candidates.end(), sampling::preferred);
    candidates.resize(static_cast<std::size_t>(count));
  }

  // At least `count` tokens reach the count-th highest of the blocks' maxima, and few more do.
  float bound_of_preferred(std::int32_t count) {
    const std::size_t blocks_here = blocks();
    if (static_cast<std::size_t>(count) > blocks_here) return -kInfinity;
    auto& keys = space_.thresholds;
    keys.assign(space_.block_highest.begin(), space_.block_highest.begin() + static_cast<std::ptrdiff_t>(blocks_here));
    std::nth_element(keys.begin(), keys.begin() + (count - 1), keys.end(), std::greater<>());
    return sampling::value(keys[static_cast<std::size_t>(count - 1)]);
  }

  // Of the raw distribution: `top_width` ids, most likely first, and their logits where the logprobs will be.
  void sort_most_likely(std::int32_t top_n) {
    const std::int32_t count = std::min(top_n, vocab_);
    if (count == 0) return;
    gather_preferred(count);
    std::sort(space_.candidates.begin(), space_.candidates.end(), sampling::preferred);
    const std::int64_t at = std::int64_t{row_} * out_.top_width;
    for (std::int32_t i = 0; i < count; ++i) {
      const Candidate& c = space_.candidates[static_cast<std::size_t>(i)];
      out_.top_token_ids[at + i] = c.id;
      out_.top_logprobs[at + i] = c.logit;
    }
  }

  void write_logprobs(const float* raw, float raw_highest, std::int32_t token) const {
    const sampling::ExpSum sum = passes_.sum_exp(raw, vocab_, {raw_highest, std::numbers::log2e_v<float>});
    const double total = static_cast<double>(sum.high) * 0x1p-30 + static_cast<double>(sum.low) * 0x1p-54;
    const auto logprob = [highest = static_cast<double>(raw_highest), log_total = std::log(total)](float logit) {
      return static_cast<float>(static_cast<double>(logit) - highest - log_total);
    };
    out_.logprobs[row_] = logprob(raw[token]);
    const std::int64_t at = std::int64_t{row_} * out_.top_width;
    for (std::int32_t i = 0, count = std::min(in_.top_n[row_], vocab_); i < count; ++i) {
      out_.top_logprobs[at + i] = logprob(out_.top_logprobs[at + i]);
    }
  }

  template <typename Predicate>
  void keep_if(Predicate predicate) {
    std::erase_if(space_.candidates, [&](const Candidate& c) { return !predicate(c); });
  }

  static std::uint64_t sum(const std::vector<Candidate>& candidates) {
    std::uint64_t total = 0;
    for (const Candidate& c : candidates) total += static_cast<std::uint64_t>(c.weight);
    return total;
  }

  // A random integer in [0, total).
  std::uint64_t draw(std::uint64_t total) const {
    __extension__ using Product = unsigned __int128;
    const std::uint64_t bits = draw_bits(in_.seed[row_], in_.choice[row_], in_.position[row_]);
    return static_cast<std::uint64_t>(Product{bits} * total >> 64);
  }

  std::uint64_t top_p_mass(std::uint64_t total) const {
    return static_cast<std::uint64_t>(std::ceil(static_cast<double>(in_.top_p[row_]) * static_cast<double>(total)));
  }

  std::int32_t least_weight() const { return static_cast<std::int32_t>(std::ceil(in_.min_p[row_] * sampling::kOne)); }

  std::size_t blocks() const { return static_cast<std::size_t>((vocab_ + kBlock - 1) / kBlock); }

  const SamplingInput& in_;
  const SamplingOutput& out_;
  const std::int32_t row_;
  const std::int32_t vocab_;
  const Passes& passes_;
  Workspace& space_;
  const float* logits_;
  float highest_ = 0;
  Scale scale_{};
};

}  // namespace

void sample(const SamplingInput& input, const SamplingOutput& output, Isa isa) {
  thread_local Workspace workspace;
  const Passes& passes = sampling::passes(isa);
  for (std::int32_t row = 0; row < input.rows; ++row) {
    RowSampler(input, output, row, passes, workspace).run();
  }
}

}  // namespace millrace

#include "millrace/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "millrace/philox.h"
#include "sampling_cut.h"
#include "sampling_draw.h"
#include "sampling_process.h"

namespace millrace {
namespace {

using sampling::Candidate;
using sampling::Passes;
using sampling::Row;
using sampling::Workspace;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class RowSampler {
 public:
  RowSampler(const SamplingInput& input, const SamplingOutput& output, std::int32_t row, const Passes& passes,
             Workspace& space)
      : in_(input), out_(output), index_(row), space_(space), row_{nullptr, input.vocab, 0, nullptr, passes} {}

  void run() {
    out_.token_ids[index_] = -1;
    out_.logprobs[index_] = std::numeric_limits<float>::quiet_NaN();
    SamplingStatus& status = out_.status[index_];
    const float* raw = in_.logits + index_ * in_.row_stride;
    status = scan(raw);
    if (status != SamplingStatus::ok) return;
    const float raw_highest = row_.highest;
    if (in_.top_n[index_] >= 0) sort_most_likely(in_.top_n[index_]);
    const float* processed = sampling::process(in_, index_, raw, space_);
    if (processed != nullptr) status = scan(processed);
    if (status != SamplingStatus::ok) return;
    const std::uint64_t bits = draw_bits(in_.seed[index_], in_.choice[index_], in_.position[index_]);
    const std::int32_t token = sampling::choose(
        row_, {in_.temperature[index_], in_.top_k[index_], in_.top_p[index_], in_.min_p[index_], bits}, space_);
    out_.token_ids[index_] = token;
    if (in_.top_n[index_] >= 0) write_logprobs(raw, raw_highest, token);
  }

 private:
  SamplingStatus scan(const float* logits) {
    std::int32_t* block_highest = sampling::ensure(space_.block_highest, sampling::blocks(in_.vocab));
    const sampling::KeyRange range = row_.passes.scan(logits, in_.vocab, block_highest);
    const bool finite = sampling::key(-kInfinity) <= range.lowest && range.highest < sampling::key(kInfinity);
    if (!finite) return SamplingStatus::not_finite;
    row_.logits = logits;
    row_.highest = sampling::value(range.highest);
    row_.block_highest = block_highest;
    return row_.highest == -kInfinity ? SamplingStatus::no_token : SamplingStatus::ok;
  }

  // Of the raw distribution: `top_width` ids, most likely first, and their logits where the logprobs will be.
  void sort_most_likely(std::int32_t top_n) {
    const std::int32_t count = std::min(top_n, in_.vocab);
    if (count == 0) return;
    sampling::gather_preferred(row_, count, space_);
    std::sort(space_.candidates.begin(), space_.candidates.end(), sampling::preferred);
    const std::int64_t at = std::int64_t{index_} * out_.top_width;
    for (std::int32_t i = 0; i < count; ++i) {
      const Candidate& c = space_.candidates[static_cast<std::size_t>(i)];
      out_.top_token_ids[at + i] = c.id;
      out_.top_logprobs[at + i] = c.logit;
    }
  }

  void write_logprobs(const float* raw, float raw_highest, std::int32_t token) const {
    const sampling::ExpSum sum = row_.passes.sum_exp(raw, in_.vocab, {raw_highest, std::numbers::log2e_v<float>});
    const double total = static_cast<double>(sum.high) * 0x1p-30 + static_cast<double>(sum.low) * 0x1p-54;
    const auto logprob = [highest = static_cast<double>(raw_highest), log_total = std::log(total)](float logit) {
      return static_cast<float>(static_cast<double>(logit) - highest - log_total);
    };
    out_.logprobs[index_] = logprob(raw[token]);
    const std::int64_t at = std::int64_t{index_} * out_.top_width;
    for (std::int32_t i = 0, count = std::min(in_.top_n[index_], in_.vocab); i < count; ++i) {
      out_.top_logprobs[at + i] = logprob(out_.top_logprobs[at + i]);
    }
  }

  const SamplingInput& in_;
  const SamplingOutput& out_;
  const std::int32_t index_;
  Workspace& space_;
  Row row_;
};

}  // namespace

void sample(const SamplingInput& input, const SamplingOutput& output, Isa isa, std::int32_t first_row,
            std::int32_t last_row) {
  thread_local Workspace workspace;
  const Passes& passes = sampling::passes(isa);
  for (std::int32_t row = first_row; row < last_row; ++row) RowSampler(input, output, row, passes, workspace).run();
}

}  // namespace millrace

#include "runtime/model.h"

#include <algorithm>
#include <utility>

#include "runtime/forward.h"

namespace millrace {
namespace {

// Gives each text of an encoder's step blocks of its own.
void place_texts(const StepInput& input, Scratch& scratch) {
  std::int32_t longest = 0;
  for (std::int32_t row = 0; row < input.rows; ++row) longest = std::max(longest, input.context_lens[row]);
  scratch.text_stride = (longest + kBlockTokens - 1) / kBlockTokens;
  scratch.text_tables.assign(static_cast<std::size_t>(input.rows * scratch.text_stride), -1);
  scratch.text_slots.resize(static_cast<std::size_t>(input.tokens));
  std::int32_t block = 0;
  for (std::int32_t row = 0; row < input.rows; ++row) {
    const std::int32_t begin = input.offsets[row], length = input.offsets[row + 1] - begin;
    for (std::int32_t i = 0; i < length; ++i) {
      scratch.text_slots[static_cast<std::size_t>(begin + i)] = block * kBlockTokens + i;
    }
    for (std::int32_t i = 0; i * kBlockTokens < length; ++i) {
      scratch.text_tables[static_cast<std::size_t>(row * scratch.text_stride + i)] = block++;
    }
  }
}

}  // namespace

Model::Model(Network network, std::unique_ptr<Weights> weights, KVType kv_type, std::int32_t kv_blocks,
             std::shared_ptr<Pool> pool, Isa isa)
    : network_(std::move(network)),
      weights_(std::move(weights)),
      kv_(network_, kv_type, kv_blocks),
      pool_(std::move(pool)),
      isa_(isa) {}

Scratch& Model::prepare(const StepInput& input) {
  if (!scratch_ || scratch_->tokens < input.tokens || scratch_->draws < input.draws) {
    const std::int32_t tokens = scratch_ ? std::max(scratch_->tokens, input.tokens) : input.tokens;
    const std::int32_t draws = scratch_ ? std::max(scratch_->draws, input.draws) : input.draws;
    scratch_.reset();
    scratch_.emplace(network_, tokens, draws, pool_->size());
    scratch_->plans.resize(network_.layers.size());
  }
  if (!network_.causal()) place_texts(input, *scratch_);
  for (std::size_t index = 0; index < network_.layers.size(); ++index) {
    if (plan_index(network_, index) != index) continue;
    const KVCache& cache = network_.causal() ? kv_.layer(index) : scratch_->texts;
    scratch_->plans[index].make(attention_input(network_, network_.layers[index], cache, input, *scratch_),
                                pool_->size());
  }
  return *scratch_;
}

const float* Model::step(const StepInput& input, SamplingInput sampling, const SamplingOutput& output) {
  draws_ = 0;  // logits() has nothing until this step is through
  Scratch& scratch = prepare(input);
  sampling.logits = scratch.logits;
  sampling.row_stride = network_.vocab;
  pool_->run([&](int thread) {
    Forward step(network_, kv_, *pool_, isa_, input, scratch, thread);
    step.run(progress_);
    if (input.pooled > 0) step.pool_rows();
    if (input.draws == 0) return;
    step.compute_logits();
    pool_->share_nowait(thread, input.draws, 1, [&](std::int64_t begin, std::int64_t end) {
      sample(sampling, output, isa_, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end));
    });
  });
  draws_ = input.draws;
  return scratch.pooled;
}

}  // namespace millrace

// A loaded model: weights, KV cache and the threads that run its steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "millrace/sampling.h"
#include "runtime/kv_store.h"
#include "runtime/network.h"
#include "runtime/pool.h"
#include "runtime/step.h"
#include "runtime/weights.h"

namespace millrace {

class Model {
 public:
  // The pool may serve several models, one step at a time.
  Model(Network network, std::unique_ptr<Weights> weights, KVType kv_type, std::int32_t kv_blocks,
        std::shared_ptr<Pool> pool, Isa isa);

  const Network& network() const { return network_; }
  KVStore& kv() { return kv_; }
  Pool& pool() { return *pool_; }
  std::size_t weight_bytes() const { return weights_->used(); }
  const std::byte* weight_data() const { return weights_->data(); }
  // Layers completed since the start; any thread may read it.
  std::int64_t progress() const { return progress_.load(std::memory_order_relaxed); }

  // Runs all layers, stores keys and values, then draws a token from the logits of each of `input.draws` tokens; the
  // logits of `sampling` are set here. Returns the vectors of `input.pooled` rows, [P][hidden]; they and logits() are
  // good until the next step.
  const float* step(const StepInput& input, SamplingInput sampling, const SamplingOutput& output);

  // Of the last step, [draws()][vocab], before penalties and masks.
  const float* logits() const { return scratch_ ? scratch_->logits : nullptr; }
  std::int32_t draws() const { return draws_; }

 private:
  Scratch& prepare(const StepInput& input);

  Network network_;
  std::unique_ptr<Weights> weights_;
  KVStore kv_;
  std::shared_ptr<Pool> pool_;
  Isa isa_;
  std::optional<Scratch> scratch_;
  std::int32_t draws_ = 0;  // of the last step
  std::atomic<std::int64_t> progress_{0};
};

}  // namespace millrace

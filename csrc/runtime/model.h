// A loaded model: weights, KV cache and the threads that run its steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

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
  // Layers completed since the start; any thread may read it.
  std::int64_t progress() const { return progress_.load(std::memory_order_relaxed); }

  // Runs all layers, stores keys and values; the results are valid until the next step.
  struct Result {
    float* logits;        // [D][vocab]
    const float* pooled;  // [P][hidden]
  };
  // `finish(thread)` runs on every thread once the logits are there: sampling, for example.
  template <class Finish>
  Result step(const StepInput& input, Finish&& finish) {
    Scratch& scratch = prepare(input);
    pool_->run([&](int thread) {
      forward(input, scratch, thread);
      finish(thread);
    });
    return {scratch.logits, scratch.pooled};
  }

 private:
  Scratch& prepare(const StepInput& input);
  void forward(const StepInput& input, Scratch& scratch, int thread);

  Network network_;
  std::unique_ptr<Weights> weights_;
  KVStore kv_;
  std::shared_ptr<Pool> pool_;
  Isa isa_;
  std::optional<Scratch> scratch_;
  std::atomic<std::int64_t> progress_{0};
};

}  // namespace millrace

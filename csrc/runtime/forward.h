// The layers of a step, as every thread of the pool runs them.
#pragma once

#include <atomic>
#include <cstdint>

#include "millrace/attention.h"
#include "runtime/kv_store.h"
#include "runtime/network.h"
#include "runtime/pool.h"
#include "runtime/step.h"

namespace millrace {

// The input of attention in `layer`; its plan is that of every layer of equal shape.
AttentionInput attention_input(const Network& network, const Layer& layer, const KVCache& cache, const StepInput& input,
                               const Scratch& scratch);
std::size_t plan_index(const Network& network, std::size_t layer);  // the first layer of equal shape

class Forward {
 public:
  Forward(const Network& network, KVStore& kv, Pool& pool, Isa isa, const StepInput& input, Scratch& scratch,
          int thread);

  // Hidden states after the last layer. `progress` counts layers.
  void run(std::atomic<std::int64_t>& progress);
  void pool_rows();
  void compute_logits();

 private:
  void embed();
  void embed_token(std::int32_t token);
  void attention(std::size_t index);
  void rotate_and_store(const Layer& layer, const KVCache& cache, std::int32_t token);
  void mlp(const Layer& layer);

  // Rows [0, rows) of what matrices of `like` are multiplied with.
  Activations activations(const PackedMatrix& like, std::int32_t rows) const;
  // The residual stream through `norm` into the activations of `next`; a norm of sums also replaces the stream.
  void encode_hidden(const Norm& norm, bool replace, const PackedMatrix& next);
  void multiply(const Linear& linear, const Activations& x, const MatmulOutput& output);
  void normalise(const Norm& norm, const float* x, std::int32_t size, float* out) const;

  float* hidden_row(std::int32_t token) const { return s_.hidden + std::int64_t{token} * n_.hidden; }
  float* row_space() const { return s_.row_space + thread_ * s_.row_size; }
  template <class Fn>
  void each_row(std::int32_t rows, Fn&& fn);  // shared out, then a barrier

  const Network& n_;
  KVStore& kv_;
  Pool& pool_;
  const Isa isa_;
  const StepInput& in_;
  Scratch& s_;
  const int thread_;
};

}  // namespace millrace

// What the steps of sampling share: a row whose maxima are known, and the buffers they work in.
#pragma once

#include <cstdint>
#include <vector>

#include "sampling_passes.h"

namespace millrace::sampling {

struct Row {
  const float* logits;
  std::int32_t vocab;
  float highest;                      // of the logits; finite
  const std::int32_t* block_highest;  // keys
  const Passes& passes;
};

// Buffers that outlive a call: allocating them anew would cost more page faults than the sampling itself.
struct Workspace {
  std::vector<float> logits;
  std::vector<std::uint32_t> occurrences;  // all 0 between rows
  std::vector<std::int32_t> block_highest;
  std::vector<std::uint64_t> block_mass;
  std::vector<std::int32_t> thresholds;
  std::vector<Candidate> candidates;
  std::vector<Candidate> consumed;
  std::vector<Candidate> found = std::vector<Candidate>(kStretch);
  std::vector<float> exact;
  std::vector<float> sampled;
  std::vector<std::int32_t> exact_weights;
  std::vector<std::int32_t> sampled_weights;
};

template <typename T>
T* ensure(std::vector<T>& buffer, std::size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

inline std::size_t blocks(std::int32_t vocab) { return static_cast<std::size_t>((vocab + kBlock - 1) / kBlock); }

}  // namespace millrace::sampling

// Where a list of candidates in the order of preference (highest logit, then lowest id) ends.
#pragma once

#include <cstdint>
#include <vector>

#include "sampling_passes.h"

namespace millrace::sampling {

struct Candidate {
  float logit;
  std::int32_t id;
  std::int32_t weight;
};

// Whether `a` is preferred to `b`.
inline bool preferred(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The candidate that completes the mass `need` when they are taken in the order of preference. Needs
// 0 < need <= the sum of weights, logits that differ by a finite number, and ids in ascending order.
// Consumes the list.
Candidate completes(std::vector<Candidate>& candidates, std::uint64_t need);

// First bin with which `need` is reached; `need` becomes what is left of it for that bin.
std::int32_t reach(const Histogram& mass, std::uint64_t& need);

}  // namespace millrace::sampling

// Candidates in the order of preference (highest logit, then lowest id): the first of them, and where a mass ends.
#pragma once

#include <cstdint>
#include <vector>

#include "sampling_row.h"

namespace millrace::sampling {

// Whether `a` is preferred to `b`.
inline bool preferred(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The candidate that completes the mass `need` when they are taken in the order of preference. Needs
// 0 < need <= the sum of weights, logits that differ by a finite number, and ids in ascending order.
// Consumes the list.
Candidate completes(std::vector<Candidate>& candidates, std::uint64_t need);

// The `count` preferred tokens of a row, in any order and unweighed, into `space.candidates`; 0 < count <= vocab.
void gather_preferred(const Row& row, std::int32_t count, Workspace& space);

}  // namespace millrace::sampling

// Narrow brackets around the logit at which top-p or min-p cuts a row: one pass then settles the cut exactly.
#pragma once

#include "sampling_row.h"

namespace millrace::sampling {

// Every weight above it is at least `least`, and none at or below its lower end is.
Bracket bracket_of_weight(std::int32_t least, Scale scale);

// A guess at where top-p, below 1, cuts: from the highest logit of each block and a sample of the others. It may miss,
// which costs time alone.
Bracket bracket_of_top_p(const Row& row, Scale scale, float top_p, Workspace& space);

}  // namespace millrace::sampling

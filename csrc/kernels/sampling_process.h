// What happens to the logits of a row before a token is chosen.
#pragma once

#include "millrace/sampling.h"
#include "sampling_row.h"

namespace millrace::sampling {

// Logit bias, then penalties, then the mask, on a copy of the row in `space`; null if there are none.
const float* process(const SamplingInput& input, std::int32_t row, const float* logits, Workspace& space);

}  // namespace millrace::sampling

// The draw of a token from processed logits.
#pragma once

#include <cstdint>

#include "sampling_row.h"

namespace millrace::sampling {

struct DrawOptions {
  float temperature;
  std::int32_t top_k;
  float top_p;
  float min_p;
  std::uint64_t bits;  // random
};

std::int32_t choose(const Row& row, const DrawOptions& options, Workspace& space);

}  // namespace millrace::sampling

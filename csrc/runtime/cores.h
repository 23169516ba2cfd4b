// The processor cores this process may use.
#pragma once

#include <vector>

namespace millrace {

// Ids of the cores the calling thread may run on (its affinity mask), ascending; never empty.
// Throws std::system_error if the kernel does not say.
std::vector<int> allowed_cores();

// How many threads can run at once: the allowed cores, or fewer under a CPU quota of the container's control group
// (whole cores, rounded down, at least 1). Hyperthreads count as cores.
int available_cores();

}  // namespace millrace

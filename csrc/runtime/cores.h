// The processor cores this process may use.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace millrace {

// Ids of the cores the calling thread may run on (its affinity mask), ascending; never empty.
// Throws std::system_error if the kernel does not say.
std::vector<int> allowed_cores();

// Cores' worth of time per period that the process's control group may use, the least of it and its ancestors; none if
// there is no limit. `membership` is written as /proc/self/cgroup, `root` is where control groups (version 1 or 2) are
// mounted.
std::optional<double> cpu_quota(const std::string& membership = "/proc/self/cgroup",
                                const std::string& root = "/sys/fs/cgroup");

// How many threads can run at once: the allowed cores, or fewer under a CPU quota (rounded down, at least 1: a thread
// more than the quota pays for stops all of them until the next period). Hyperthreads count as cores.
int available_cores();

// Keeps the calling thread on `core` from now on. A core that is gone leaves it where it is: slower, not wrong.
void pin_to(int core);

// Moves the calling thread to `core` if it may run there. Its affinity mask, which threads it starts inherit, stays.
void move_to(int core);

}  // namespace millrace

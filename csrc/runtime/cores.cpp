#include "runtime/cores.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

namespace millrace {

namespace {

namespace fs = std::filesystem;

// One bit per core, for as many cores as Linux can be built for; cpu_set_t ends at 1024.
class Mask {
 public:
  bool has(int core) const { return CPU_ISSET_S(static_cast<std::size_t>(core), sizeof sets_, sets_); }
  void add(int core) { CPU_SET_S(static_cast<std::size_t>(core), sizeof sets_, sets_); }
  bool load() { return sched_getaffinity(0, sizeof sets_, sets_) == 0; }
  bool apply() const { return sched_setaffinity(0, sizeof sets_, sets_) == 0; }

  static constexpr int kCores = 8192;

 private:
  cpu_set_t sets_[kCores / CPU_SETSIZE] = {};
};

Mask only(int core) {
  Mask mask;
  mask.add(core);
  return mask;
}

// The number a file begins with; none if there is no such file or it says "max".
std::optional<double> number(const fs::path& file) {
  std::ifstream stream(file);
  double value = 0;
  return stream >> value ? std::optional(value) : std::nullopt;
}

std::optional<double> quota_of(const fs::path& group) {
  std::ifstream unified(group / "cpu.max");
  double quota = 0, period = 0;
  if (unified >> quota >> period && period > 0) return quota / period;
  const auto old_quota = number(group / "cpu.cfs_quota_us"), old_period = number(group / "cpu.cfs_period_us");
  if (old_quota && old_period && *old_quota > 0 && *old_period > 0) return *old_quota / *old_period;
  return std::nullopt;
}

// Where the group of one line of /proc/self/cgroup, "id:controllers:path", keeps its CPU limits below the root: the
// unified hierarchy (version 2) names no controllers. Empty for a hierarchy of other controllers.
std::optional<fs::path> cpu_group(const std::string& line) {
  const auto first = line.find(':'), second = line.find(':', first + 1);
  if (second == std::string::npos) return std::nullopt;
  const std::string path = line.substr(std::min(second + 2, line.size()));
  std::istringstream controllers(line.substr(first + 1, second - first - 1));
  if (second == first + 1) return fs::path(path);
  for (std::string name; std::getline(controllers, name, ',');) {
    if (name == "cpu") return fs::path("cpu") / path;
  }
  return std::nullopt;
}

}  // namespace

std::vector<int> allowed_cores() {
  Mask mask;
  if (!mask.load()) throw std::system_error(errno, std::generic_category(), "sched_getaffinity");
  std::vector<int> cores;
  for (int core = 0; core < Mask::kCores; ++core) {
    if (mask.has(core)) cores.push_back(core);
  }
  return cores;
}

std::optional<double> cpu_quota(const std::string& membership, const std::string& root) {
  std::optional<double> least;
  std::ifstream lines(membership);
  for (std::string line; std::getline(lines, line);) {
    const auto group = cpu_group(line);
    if (!group) continue;
    // In a container the path may be the host's and not exist here: the container's own limit is then at the root.
    for (fs::path at = *group;; at = at.parent_path()) {
      const auto quota = quota_of(root / at);
      if (quota && (!least || *quota < *least)) least = quota;
      if (at.empty()) break;
    }
  }
  return least;
}

int available_cores() {
  const auto allowed = static_cast<int>(allowed_cores().size());
  const auto quota = cpu_quota();
  return quota && *quota < allowed ? std::max(1, static_cast<int>(*quota)) : allowed;
}

void pin_to(int core) { only(core).apply(); }

void move_to(int core) {
  Mask mask;
  if (sched_getcpu() != core && mask.load() && mask.has(core) && only(core).apply()) mask.apply();
}

}  // namespace millrace

#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "runtime/cores.h"

namespace {

namespace fs = std::filesystem;

// The tree of control groups a process sees, written to a folder of its own.
class Groups {
 public:
  Groups() {
    std::string folder = (fs::temp_directory_path() / "millrace-cores-XXXXXX").string();
    expect(mkdtemp(folder.data()) != nullptr, "a folder to write to");
    root_ = folder;
  }
  ~Groups() { fs::remove_all(root_); }
  Groups(const Groups&) = delete;
  Groups& operator=(const Groups&) = delete;

  Groups& write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
    return *this;
  }
  std::optional<double> quota() const { return millrace::cpu_quota((root_ / "membership").string(), root_.string()); }

 private:
  fs::path root_;
};

void quotas_of_both_versions() {
  expect(!Groups().quota(), "no control groups");
  expect(!Groups().write("membership", "0::/\n").write("cpu.max", "max 100000\n").quota(), "no limit");
  expect(Groups().write("membership", "0::/\n").write("cpu.max", "250000 100000\n").quota() == 2.5, "version 2");
  expect(Groups().write("membership", "0::/pod/box\n")
                 .write("pod/cpu.max", "150000 100000\n")
                 .write("pod/box/cpu.max", "400000 100000\n")
                 .quota() == 1.5,
         "the least of the ancestors");
  expect(Groups().write("membership", "0::/not/here\n").write("cpu.max", "50000 100000\n").quota() == 0.5,
         "in a container the limit is at the root");
  Groups old;
  old.write("membership", "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\nnonsense\n\n1:name=x:\n");
  old.write("cpu/a/cpu.cfs_quota_us", "-1\n").write("cpu/a/cpu.cfs_period_us", "100000\n");
  expect(!old.quota(), "version 1 without a limit");
  old.write("cpu/a/cpu.cfs_quota_us", "300000\n").write("memory/a/cpu.cfs_quota_us", "1\n");
  expect(old.quota() == 3.0, "version 1");
}

void moving_a_thread_leaves_its_mask_and_pinning_does_not() {
  const std::vector<int> allowed = millrace::allowed_cores();
  expect(!allowed.empty(), "at least one core");
  const int available = millrace::available_cores();
  expect(available >= 1 && available <= static_cast<int>(allowed.size()), "no more than allowed");
  std::thread([&allowed] {
    for (const int core : allowed) {
      millrace::move_to(core);
      expect(millrace::allowed_cores() == allowed, "the mask stays");
    }
    millrace::pin_to(allowed.back());
    expect(millrace::allowed_cores() == std::vector<int>{allowed.back()}, "pinned");
    millrace::move_to(allowed.front());
    millrace::move_to(8000);
    millrace::pin_to(8000);
    expect(millrace::allowed_cores() == std::vector<int>{allowed.back()}, "no way to other cores, nor to none");
  }).join();
}

}  // namespace

int main() {
  quotas_of_both_versions();
  moving_a_thread_leaves_its_mask_and_pinning_does_not();
}

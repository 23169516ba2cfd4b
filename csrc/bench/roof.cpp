#include "roof.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "roof_loops.h"

namespace millrace::roof {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kRegister = 32;                    // bytes of an AVX2 register
constexpr std::int64_t kTile = 16 * 16;                   // sums of an AMX tile
constexpr auto kRun = std::chrono::microseconds(2'000);   // of registers only: short enough to fit between interrupts
constexpr std::size_t kStep = 256;                        // bytes that a reading loop takes at once
constexpr std::size_t kReadRun = std::size_t{64} << 20U;  // bytes of a thread
constexpr std::size_t kHugePage = std::size_t{2} << 20U;

bool has(Isa isa) {
  static const std::vector<Isa> found = available_isas();
  return std::find(found.begin(), found.end(), isa) != found.end();
}

void read_words(const void* data, std::size_t bytes) {
  const auto* from = static_cast<const char*>(data);
  std::uint64_t sum = 0;
  for (std::size_t at = 0; at < bytes; at += sizeof(sum)) {
    std::uint64_t word = 0;
    std::memcpy(&word, from + at, sizeof(word));
    sum ^= word;
  }
  asm volatile("" : "+r"(sum));  // used: the compiler keeps the loads
}

auto reading_loop() { return has(Isa::avx512) ? avx512::read : has(Isa::avx2) ? avx2::read : read_words; }

void pin(int index) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof(allowed), &allowed);
  int left = index % std::max(CPU_COUNT(&allowed), 1);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || left-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
    return;
  }
}

// Runs `work(thread)` on all threads at once, again and again; the shortest time from the start of all to the end of
// the last: noise only ever adds.
double shortest_seconds(int threads, double seconds, const std::function<void(int)>& work) {
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  Clock::time_point started;
  bool more = true;
  bool warm = false;
  double shortest = std::numeric_limits<double>::infinity();
  const auto turn = [&]() noexcept {
    const auto now = Clock::now();
    if (warm) shortest = std::min(shortest, std::chrono::duration<double>(now - started).count());
    more = now < end || !warm;
    warm = started != Clock::time_point{};  // the first run only wakes the cores
    started = Clock::now();
  };
  std::barrier barrier(threads, turn);
  std::vector<std::jthread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      pin(thread);
      barrier.arrive_and_wait();
      while (more) {
        work(thread);
        barrier.arrive_and_wait();
      }
    });
  }
  pool.clear();
  return shortest;
}

// How many rounds take about kRun.
std::int64_t rounds_of(const Compute& loop) {
  for (std::int64_t rounds = 1024;; rounds *= 2) {
    const auto start = Clock::now();
    loop.run(rounds);
    if (Clock::now() - start >= kRun) return rounds;
  }
}

class HugePages {
 public:
  explicit HugePages(std::size_t bytes) : bytes_(bytes) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<char*>(mapped);
    madvise(data_, bytes, MADV_HUGEPAGE);
    std::memset(data_, 1, bytes);  // without it every page is the kernel's one page of zeros
  }
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  ~HugePages() { munmap(data_, bytes_); }

  const char* data() const { return data_; }

 private:
  std::size_t bytes_;
  char* data_;
};

}  // namespace

std::vector<Compute> compute_loops() {
  const std::vector<Compute> all{
      {"fp32", Isa::avx2, avx2::fp32, avx2::kAccumulators * kRegister / 4 * 2},
      {"int8", Isa::avx2, avx2::int8, avx2::kAccumulators * kRegister * 2},
      {"fp32", Isa::avx512, avx512::fp32, avx512::kAccumulators * 2 * kRegister / 4 * 2},
      {"int8", Isa::avx512, avx512::int8, avx512::kAccumulators * 2 * kRegister * 2},
      {"bf16", Isa::avx512_bf16, avx512_bf16::bf16, avx512_bf16::kAccumulators * 2 * kRegister / 2 * 2},
      {"bf16", Isa::amx, amx::bf16, amx::kAccumulators * kTile * 32 * 2},
      {"int8", Isa::amx, amx::int8, amx::kAccumulators * kTile * 64 * 2},
  };
  std::vector<Compute> loops;
  std::copy_if(all.begin(), all.end(), std::back_inserter(loops), [](const Compute& loop) { return has(loop.isa); });
  return loops;
}

double measure_compute(const Compute& loop, int threads, double seconds) {
  const std::int64_t rounds = rounds_of(loop);
  const double shortest = shortest_seconds(threads, seconds, [&](int) { loop.run(rounds); });
  return static_cast<double>(rounds) * static_cast<double>(loop.ops) * threads / shortest;
}

double measure_read(const void* data, std::size_t bytes, int threads, double seconds) {
  const auto read = reading_loop();
  const std::size_t part = bytes / static_cast<std::size_t>(threads) / kStep * kStep;
  if (part == 0) throw std::invalid_argument("too few bytes for so many threads to read");
  const double shortest = shortest_seconds(threads, seconds, [&](int thread) {
    read(static_cast<const char*>(data) + static_cast<std::size_t>(thread) * part, part);
  });
  return static_cast<double>(part) * threads / shortest;
}

double measure_read(std::size_t bytes, int threads, double seconds) {
  const auto read = reading_loop();
  const auto count = static_cast<std::size_t>(threads);
  const std::size_t part = std::max(bytes / count / kStep, std::size_t{1}) * kStep;
  const HugePages memory((part * count + kHugePage - 1) / kHugePage * kHugePage);
  // A run is short enough to fit between interrupts. It goes on where the last one ended, so that a part which is
  // larger than the cache never finds itself there; small parts are read many times over.
  const std::size_t slice = std::min(part, kReadRun);
  const std::size_t times = kReadRun / slice;
  std::vector<std::size_t> next(count);
  const double shortest = shortest_seconds(threads, seconds, [&](int thread) {
    const auto index = static_cast<std::size_t>(thread);
    for (std::size_t i = 0; i < times; ++i) {
      read(memory.data() + index * part + next[index], slice);
      next[index] = next[index] + 2 * slice > part ? 0 : next[index] + slice;
    }
  });
  return static_cast<double>(slice * times * count) / shortest;
}

}  // namespace millrace::roof

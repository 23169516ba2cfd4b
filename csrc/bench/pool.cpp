#include "bench/pool.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <thread>

#include "runtime/pool.h"

namespace millrace::bench {

namespace {

constexpr int kBatch = 100;

// batch(n) does n rounds. Short batches: some of them meet no other process.
template <class Batch>
double least_mean(int rounds, Batch&& batch) {
  using Clock = std::chrono::steady_clock;
  if (rounds < kBatch) throw std::invalid_argument("at least 100 rounds are needed");
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < rounds / kBatch; ++i) {
    const auto start = Clock::now();
    batch(kBatch);
    least = std::min(least, std::chrono::duration<double, std::nano>(Clock::now() - start).count() / kBatch);
  }
  return least;
}

double processor_microseconds(int who) {
  rusage usage{};
  getrusage(who, &usage);
  const auto microseconds = [](const timeval& t) {
    return 1e6 * static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec);
  };
  return microseconds(usage.ru_utime) + microseconds(usage.ru_stime);
}

}  // namespace

double barrier_nanoseconds(int threads, int rounds) {
  Pool pool(threads);
  return least_mean(rounds, [&pool](int n) {
    pool.run([&pool, n](int thread) {
      for (int i = 0; i < n; ++i) pool.barrier(thread);
    });
  });
}

double run_nanoseconds(int threads, int rounds) {
  Pool pool(threads);
  return least_mean(rounds, [&pool](int n) {
    for (int i = 0; i < n; ++i) pool.run([](int) {});
  });
}

double share_nanoseconds(int threads, int rounds) {
  Pool pool(threads);
  return least_mean(rounds, [&pool, threads](int n) {
    pool.run([&pool, threads, n](int thread) {
      for (int i = 0; i < n; ++i) pool.share(thread, threads, 1, [](std::int64_t, std::int64_t) {});
    });
  });
}

double idle_microseconds(int threads, int rounds) {
  if (threads < 2 || rounds < 1) throw std::invalid_argument("at least two threads and one round are needed");
  Pool pool(threads);
  pool.run([](int) {});
  const auto workers = [] { return processor_microseconds(RUSAGE_SELF) - processor_microseconds(RUSAGE_THREAD); };
  const double before = workers();
  for (int i = 0; i < rounds; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    pool.run([](int) {});
  }
  return (workers() - before) / (rounds * (threads - 1));
}

}  // namespace millrace::bench

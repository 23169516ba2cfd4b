// Counts and orders, never times. `test_pool N` does N times as much: the thread sanitizer watches that (make soak).
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "runtime/cores.h"
#include "runtime/pool.h"

namespace {

std::atomic<long> allocations{0};

}  // namespace

void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using millrace::Pool;

constexpr int kMostThreads = 8;

std::string on(int threads) { return " on " + std::to_string(threads) + " threads"; }

// Plain integers: the thread sanitizer proves that nothing but the pool's promises orders the accesses.
using Counts = std::vector<int>;

void take(Counts& counts, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) ++counts[static_cast<std::size_t>(i)];
}

bool all(const Counts& counts, int value) {
  for (const int count : counts) {
    if (count != value) return false;
  }
  return true;
}

void every_index_is_handed_out_once(int rounds) {
  for (int threads = 1; threads <= kMostThreads; ++threads) {
    Pool pool(threads);
    expect(pool.size() == threads, "size");
    for (const std::int64_t count : {0, 1, 2, 7, 17, 31, 33, 129, 1000}) {
      for (const std::int64_t grain : {1, 3, 64, 2000}) {
        Counts counts(static_cast<std::size_t>(count));
        pool.run([&](int thread) {
          for (int round = 0; round < rounds; ++round) {
            pool.share(thread, count, grain, [&](std::int64_t begin, std::int64_t end) {
              expect(begin % grain == 0 && begin < end && end == std::min(begin + grain, count), "the piece");
              take(counts, begin, end);
            });
          }
        });
        expect(all(counts, rounds), "every index once" + on(threads));
      }
    }
  }
}

// More loops than may be open at once, of different lengths, none waiting for the one before; then they meet.
void loops_without_a_barrier_overlap(int rounds) {
  for (int threads = 1; threads <= kMostThreads; ++threads) {
    Pool pool(threads);
    std::vector<Counts> loops;
    for (std::size_t loop = 0; loop < 21; ++loop) loops.emplace_back(loop * 5 % 33);
    for (int round = 0; round < rounds; ++round) {
      pool.run([&](int thread) {
        for (Counts& loop : loops) {
          const auto count = static_cast<std::int64_t>(loop.size());
          pool.share_nowait(thread, count, 2, [&](std::int64_t begin, std::int64_t end) { take(loop, begin, end); });
        }
        pool.barrier(thread);
        for (const Counts& loop : loops) expect(all(loop, round + 1), "every index of every loop" + on(threads));
      });
    }
  }
}

// Each thread writes, all meet, each reads what its neighbour wrote, all meet again.
void nobody_leaves_a_barrier_before_all_have_come(int threads, int rounds) {
  Pool pool(threads);
  Counts written(static_cast<std::size_t>(threads));
  pool.run([&](int thread) {
    const auto mine = static_cast<std::size_t>(thread), next = (mine + 1) % written.size();
    for (int round = 1; round <= rounds; ++round) {
      written[mine] = round;
      pool.barrier(thread);
      expect(written[next] == round, "what the neighbour wrote before the barrier" + on(threads));
      pool.barrier(thread);
    }
  });
  expect(all(written, rounds), "run returns after all");
}

void runs_follow_each_other(int threads, int rounds) {
  Pool pool(threads);
  Counts runs(static_cast<std::size_t>(threads));
  for (int round = 0; round < rounds; ++round) pool.run([&runs](int thread) { take(runs, thread, thread + 1); });
  expect(all(runs, rounds), "every thread took part in every run" + on(threads));
}

void different_threads_may_call() {
  Pool pool(3);
  Counts runs(3);
  for (int caller = 0; caller < 20; ++caller) {
    std::thread([&] { pool.run([&runs](int thread) { take(runs, thread, thread + 1); }); }).join();
  }
  expect(all(runs, 20), "whoever calls");
}

void run_allocates_nothing() {
  Pool pool(4);
  pool.run([](int) {});
  const long before = allocations;
  pool.run([&pool](int thread) { pool.share(thread, 100, 3, [](std::int64_t, std::int64_t) {}); });
  expect(allocations == before, "no allocation");
}

void the_first_error_is_rethrown_and_nobody_is_left_waiting(int rounds) {
  for (int threads = 1; threads <= kMostThreads; ++threads) {
    Pool pool(threads);
    for (int round = 0; round < rounds; ++round) {
      const int thrower = round % threads, after = round % 4;
      std::atomic<int> ended{0};
      std::string caught;
      struct Ended {
        std::atomic<int>& count;
        ~Ended() { ++count; }
      };
      try {
        pool.run([&](int thread) {
          const Ended guard{ended};
          for (int i = 0;; ++i) {
            if (thread == thrower && i == after) throw std::runtime_error("thread " + std::to_string(thread));
            pool.share_nowait(thread, threads, 1, [](std::int64_t, std::int64_t) {});
            pool.barrier(thread);
          }
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      expect(caught == "thread " + std::to_string(thrower), "the error itself" + on(threads));
      expect(ended == threads, "after all have ended" + on(threads));
    }
    int sum = 0;
    pool.run([&](int thread) { pool.share(thread, 1, 1, [&sum](std::int64_t, std::int64_t) { ++sum; }); });
    expect(sum == 1, "the pool serves the next job" + on(threads));
  }
}

void an_error_inside_a_loop_or_in_all_threads_at_once() {
  Pool pool(4);
  for (int round = 0; round < 50; ++round) {
    expect_throws<std::range_error>(
        [&] {
          pool.run([&](int thread) {
            pool.share(thread, 40, 1, [](std::int64_t begin, std::int64_t) {
              if (begin == 17) throw std::range_error("in a loop");
            });
            expect(false, "nobody passes the barrier of a loop that failed");
          });
        },
        "from a loop");
    expect_throws<std::range_error>([&] { pool.run([](int) { throw std::range_error("all"); }); }, "from all");
  }
  runs_follow_each_other(4, 3);
}

template <class Job>
void expect_misuse(const std::string& what, Job&& job) {
  for (const int threads : {1, 3}) {
    Pool pool(threads);
    expect_throws<std::logic_error>([&] { pool.run([&](int thread) { job(pool, thread); }); }, what + on(threads));
    int runs = 0;
    pool.run([&runs](int thread) {
      if (thread == 0) ++runs;
    });
    expect(runs == 1, "the pool serves the next job after " + what);
  }
}

void misuse_is_an_error() {
  const auto nothing = [](std::int64_t, std::int64_t) {};
  expect_misuse("a run in a run", [](Pool& pool, int) { pool.run([](int) {}); });
  expect_misuse("a loop in a loop", [&](Pool& pool, int thread) {
    pool.share(thread, 9, 1, [&](std::int64_t, std::int64_t) { pool.share_nowait(thread, 9, 1, nothing); });
  });
  expect_misuse("a barrier in a loop", [](Pool& pool, int thread) {
    pool.share(thread, 9, 1, [&](std::int64_t, std::int64_t) { pool.barrier(thread); });
  });
  expect_misuse("no such thread", [](Pool& pool, int thread) { pool.barrier(thread + pool.size()); });
  expect_misuse("a negative count", [&](Pool& pool, int thread) { pool.share(thread, -1, 1, nothing); });
  expect_misuse("no grain", [&](Pool& pool, int thread) { pool.share(thread, 1, 0, nothing); });

  Pool pool(2);
  expect_throws<std::logic_error>([&pool] { pool.barrier(0); }, "a barrier outside a job");
  expect_throws<std::logic_error>([&] { pool.share(0, 1, 1, nothing); }, "a loop outside a job");
  for (const int bad : {0, -1, Pool::kMaxThreads + 1}) {
    expect_throws<std::invalid_argument>([bad] { Pool{bad}; }, "a pool of " + std::to_string(bad));
  }
  expect_throws<std::invalid_argument>([] { Pool(1, -1); }, "a negative core");
}

void two_callers_at_once_are_an_error() {
  Pool pool(2);
  pool.run([&pool](int thread) {
    if (thread != 0) return;
    std::thread([&pool] { expect_throws<std::logic_error>([&] { pool.run([](int) {}); }, "two callers"); }).join();
  });
}

// Without this such a job would wait for ever.
void a_barrier_not_all_come_to_is_an_error(int rounds) {
  for (const int threads : {2, 3, 8}) {
    Pool pool(threads);
    for (int round = 0; round < rounds; ++round) {
      expect_throws<std::logic_error>(
          [&] {
            pool.run([&](int thread) {
              for (int i = 0; i < 3 + (thread == round % threads); ++i) pool.barrier(thread);
            });
          },
          "a barrier more than the others");
    }
    nobody_leaves_a_barrier_before_all_have_come(threads, 10);
  }
}

void loops_that_differ_are_an_error() {
  Pool pool(2);
  // Thread 1 leaves out loops, so that thread 0 meets numbers from before its loop began.
  expect_throws<std::logic_error>(
      [&] {
        pool.run([&](int thread) {
          for (int i = 0; i < 3; ++i) {
            if (thread == 0) pool.share_nowait(thread, 5, 1, [](std::int64_t, std::int64_t) {});
            pool.barrier(thread);
          }
        });
      },
      "a loop only one thread takes part in");
}

// State and context switches of the pool's workers, as the kernel counts them.
struct Workers {
  int count = 0;
  int asleep = 0;
  long switches = 0;

  Workers() {
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
      std::ifstream status(task.path() / "status");
      std::string word, name;
      bool sleeping = false;
      long value = 0, switched = 0;
      while (status >> word) {
        if (word == "Name:") status >> name;
        if (word == "State:") sleeping = status >> word && word == "S";
        if (word.ends_with("_ctxt_switches:")) status >> value, switched += value;
      }
      if (!name.starts_with("millrace/")) continue;
      ++count;
      asleep += sleeping;
      switches += switched;
    }
  }
};

// Returns when all workers sleep; if they spun for ever, the test would not end.
Workers sleeping_workers(int count) {
  for (;;) {
    const Workers workers;
    if (workers.count == count && workers.asleep == count) return workers;
    std::this_thread::yield();
  }
}

void idle_workers_sleep_and_wake(int rounds) {
  Pool pool(4);
  Counts runs(4);
  for (int round = 0; round < rounds; ++round) {
    const Workers before = sleeping_workers(3);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const Workers after;
    expect(after.asleep == 3 && after.switches == before.switches, "an idle worker is never scheduled");
    pool.run([&runs](int thread) { take(runs, thread, thread + 1); });
  }
  expect(all(runs, rounds), "woken by run");
}

void those_asleep_in_a_barrier_wake_for_all_or_for_an_error() {
  Pool pool(4);
  for (const bool fails : {false, true}) {
    bool failed = false;
    try {
      pool.run([&pool, fails](int thread) {
        if (thread == 0) sleeping_workers(3);
        if (thread == 0 && fails) throw std::runtime_error("while the others sleep");
        pool.barrier(thread);
      });
    } catch (const std::runtime_error&) {
      failed = true;
    }
    expect(failed == fails, "woken in a barrier");
  }
}

void pools_end_at_any_time(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    {
      Pool untouched(1 + round % kMostThreads);
    }
    Pool used(1 + round % kMostThreads);
    used.run([](int) {});
  }
  Pool asleep(4);
  sleeping_workers(3);
}

// As several workers of one host: each has its own cores where there are enough, the kernel's choice otherwise.
void many_pools_divide_the_cores(int rounds) {
  const std::vector<int> allowed = millrace::allowed_cores();
  std::vector<std::thread> callers;
  for (int first = 0; first < 4; ++first) {
    callers.emplace_back([&allowed, first, rounds] {
      Pool pool(2, first);
      const bool enough = static_cast<std::size_t>(first) + 2 <= allowed.size();
      std::vector<std::vector<int>> cores(2);
      pool.run([&cores](int thread) { cores[static_cast<std::size_t>(thread)] = millrace::allowed_cores(); });
      expect(cores[0] == allowed, "the caller's mask is its own");
      expect(cores[1] == (enough ? std::vector{allowed[static_cast<std::size_t>(first) + 1]} : allowed), "its core");
      int sum = 0;
      for (int round = 0; round < rounds; ++round) {
        pool.run([&](int thread) {
          pool.share(thread, 1, 1, [&sum](std::int64_t, std::int64_t) { ++sum; });
          pool.share(thread, 1, 1, [&sum](std::int64_t, std::int64_t) { ++sum; });
        });
      }
      expect(sum == 2 * rounds, "beside the other pools");
    });
  }
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int count, char** arguments) {
  const int times = count > 1 ? std::atoi(arguments[1]) : 1;
  every_index_is_handed_out_once(3 * times);
  loops_without_a_barrier_overlap(10 * times);
  for (int threads = 1; threads <= kMostThreads; ++threads) {
    nobody_leaves_a_barrier_before_all_have_come(threads, threads == 2 ? 50'000 * times : 500 * times);
    runs_follow_each_other(threads, 200 * times);
  }
  different_threads_may_call();
  run_allocates_nothing();
  the_first_error_is_rethrown_and_nobody_is_left_waiting(20 * times);
  an_error_inside_a_loop_or_in_all_threads_at_once();
  misuse_is_an_error();
  two_callers_at_once_are_an_error();
  a_barrier_not_all_come_to_is_an_error(30 * times);
  loops_that_differ_are_an_error();
  idle_workers_sleep_and_wake(5 * times);
  those_asleep_in_a_barrier_wake_for_all_or_for_an_error();
  pools_end_at_any_time(40 * times);
  many_pools_divide_the_cores(200 * times);
}

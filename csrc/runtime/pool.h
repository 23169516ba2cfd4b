// The threads that compute a step.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <vector>

#include "runtime/epoch.h"

namespace millrace {

// A step is one `run`; inside it the threads meet at barriers and share out loops:
//
//   pool.run([&](int thread) {
//     pool.share(thread, rows, 1, [&](std::int64_t begin, std::int64_t end) { normalise(begin, end); });
//     pool.share(thread, columns, 64, [&](std::int64_t begin, std::int64_t end) { multiply(begin, end); });
//   });
//
// Threads that wait spin for at most 50 us, or about 2 us where there are more threads than cores, and then sleep.
// All threads of a job make the same calls of barrier, share and share_nowait, in the same order with the same count
// and grain, and none of them inside a function given to share. A thread that leaves a barrier, a loop or a job sees
// what the others wrote before they entered that barrier, or left that job; share_nowait promises nothing of the kind.
//
// Misuse (a nested run or loop, a barrier not all threads come to) is a std::logic_error from run.
class Pool {
 public:
  static constexpr int kMaxThreads = 1024;

  // `threads`, 1 to kMaxThreads, includes the caller of run; a pool of one starts no thread. Where the process may use
  // at least first_core + threads cores, thread i runs on number first_core + i of allowed_cores(): several workers of
  // one host divide the cores by first_core. Otherwise the kernel places the threads.
  // Throws std::invalid_argument, or std::system_error if a thread cannot be started.
  explicit Pool(int threads, int first_core = 0);

  // No job may be running.
  ~Pool();

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(seats_.size()); }

  // Runs job(thread) on every thread, on the caller's as thread 0, and returns when all have returned. Allocates
  // nothing. Callers may differ from run to run, but one run must end before the next begins (std::logic_error). A
  // caller found on another core than the pool's first is moved there once, its affinity mask unchanged.
  //
  // If a thread throws, barrier, share and share_nowait throw in the others from then on, something that nobody can
  // name (a job that says catch (...) rethrows). When all have ended, the first exception is rethrown here; the pool
  // then serves the next job.
  template <class Job>
  void run(Job&& job) {
    using Callable = std::remove_reference_t<Job>;
    start([](const void* callable, int thread) { (*static_cast<Callable*>(const_cast<void*>(callable)))(thread); },
          std::addressof(job));
  }

  // Inside a job: returns when every thread has come here.
  void barrier(int thread);

  // Inside a job: calls fn(begin, end) for the pieces [0, grain), [grain, 2 grain) ... of [0, count), each on the
  // thread that is free first, so that one which loses its core does not hold up the others; then a barrier. The
  // pieces depend on count and grain only: what fn computes for one must not depend on the thread, then results do not.
  // Throws std::invalid_argument unless count >= 0 and grain >= 1.
  template <class Fn>
  void share(int thread, std::int64_t count, std::int64_t grain, Fn&& fn) {
    share_nowait(thread, count, grain, fn);
    barrier(thread);
  }

  // The same without the barrier: a thread returns when no piece is left to begin. For loops that do not read what the
  // one before wrote. The ninth such loop after a barrier waits for all threads first.
  template <class Fn>
  void share_nowait(int thread, std::int64_t count, std::int64_t grain, Fn&& fn) {
    Loop loop = enter(thread, count, grain);
    for (std::int64_t piece = loop.next(); piece < loop.pieces; piece = loop.next()) {
      fn(piece * grain, count - piece * grain < grain ? count : (piece + 1) * grain);
    }
    leave(thread, loop);
  }

 private:
  using Call = void (*)(const void* callable, int thread);
  struct Stop {};  // thrown in the other threads once one has thrown
  static constexpr char kUnevenBarriers[] = "the threads of a job must all come to the same barriers";
  static constexpr char kUnevenLoops[] = "the threads of a job must all share the same loops";

  // Pieces are numbered by a counter that is never set back, which would take a barrier: a loop uses up one number per
  // piece and one per thread, the one that tells it to leave, so every thread knows where the next loop begins.
  struct alignas(kFalseSharing) Counter {
    std::atomic<std::int64_t> value{0};
  };
  struct Loop {
    std::atomic<std::int64_t>& counter;
    std::int64_t begin;
    std::int64_t pieces;
    std::int64_t next() {
      const std::int64_t piece = counter.fetch_add(1, std::memory_order_relaxed) - begin;
      if (piece < 0) throw std::logic_error(kUnevenLoops);
      return piece;
    }
  };
  static constexpr int kLoops = 8;  // that threads may be in at once, between two barriers

  // What only its own thread touches, but for run between jobs.
  struct alignas(kFalseSharing) Seat {
    std::array<std::int64_t, kLoops> begins{};  // where the next loop on each counter begins
    int loops = 0;                              // since the last barrier
    bool looping = false;
  };

  // Threads arrive; the last one advances the epoch.
  struct Meeting {
    alignas(kFalseSharing) std::atomic<int> arrived{0};
    Epoch epoch;
    bool arrive(int size);
  };

  void start(Call call, const void* callable);
  void work(int thread);
  void perform(int thread) noexcept;
  void fail(std::exception_ptr error) noexcept;
  std::exception_ptr recover();
  void join() noexcept;
  Seat& seat(int thread);
  Loop enter(int thread, std::int64_t count, std::int64_t grain);
  void leave(int thread, const Loop& loop);

  std::vector<Seat> seats_;
  std::vector<int> cores_;  // one per thread; empty: not pinned
  std::chrono::nanoseconds spin_{0};
  Call call_ = nullptr;  // null when workers are to end
  const void* callable_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> running_{false};
  std::atomic<bool> failing_{false};  // somebody writes error_
  std::atomic<bool> failed_{false};   // error_ is written
  Epoch started_;
  Meeting barrier_;
  Meeting finished_;
  alignas(kFalseSharing) std::atomic<int> ended_{0};  // threads whose job returned
  std::array<Counter, kLoops> counters_;
  std::vector<std::thread> workers_;
};

}  // namespace millrace

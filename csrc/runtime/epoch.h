// A count that threads wait on: what barriers and the start of a job are made of.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace millrace {

// Apart by this much, two atomics do not slow each other down: processors fetch cache lines of 64 bytes in pairs.
inline constexpr std::size_t kFalseSharing = 128;

// Waiting spins at first and then sleeps in the kernel (Linux futex), so that a short wait is answered within a cache
// miss and a long one costs nothing. At most one thread advances at a time; any number wait.
class Epoch {
 public:
  std::uint32_t now() const { return word_.load(std::memory_order_acquire) & ~kSleepers; }

  // Wakes whoever waits. What the caller wrote before is visible to those it wakes.
  void advance();

  // Returns once the epoch is no longer `epoch`; sleeps after spinning for about `spin`. The new epoch.
  std::uint32_t wait(std::uint32_t epoch, std::chrono::nanoseconds spin);

 private:
  bool spin(std::uint32_t epoch, std::chrono::nanoseconds limit) const;

  static constexpr std::uint32_t kSleepers = 1;  // set by those who sleep, so that others advance without a system call
  alignas(kFalseSharing) std::atomic<std::uint32_t> word_{0};
};

}  // namespace millrace

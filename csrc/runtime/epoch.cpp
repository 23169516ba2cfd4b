#include "runtime/epoch.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace millrace {

namespace {

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));

long futex(std::atomic<std::uint32_t>& word, int operation, std::uint32_t value) {
  return syscall(SYS_futex, &word, operation, value, nullptr, nullptr, 0);
}

}  // namespace

void Epoch::advance() {
  const std::uint32_t next = (word_.load(std::memory_order_relaxed) | kSleepers) + 1;
  if (word_.exchange(next) & kSleepers) futex(word_, FUTEX_WAKE_PRIVATE, INT_MAX);
}

std::uint32_t Epoch::wait(std::uint32_t epoch, std::chrono::nanoseconds limit) {
  if (spin(epoch, limit)) return now();
  for (;;) {
    std::uint32_t seen = epoch;
    word_.compare_exchange_strong(seen, epoch | kSleepers);
    if ((seen & ~kSleepers) != epoch) return seen & ~kSleepers;
    // Returns at once if the word has changed since, and now and then for no reason.
    futex(word_, FUTEX_WAIT_PRIVATE, epoch | kSleepers);
  }
}

// Whether the epoch ended meanwhile. The clock is read once in 64 rounds, 1 to 3 us.
bool Epoch::spin(std::uint32_t epoch, std::chrono::nanoseconds limit) const {
  using Clock = std::chrono::steady_clock;
  Clock::time_point end{};
  for (;;) {
    for (int round = 0; round < 64; ++round) {
      if (now() != epoch) return true;
      __builtin_ia32_pause();
    }
    const Clock::time_point time = Clock::now();
    if (end == Clock::time_point{}) end = time + limit;
    if (time >= end) return false;
  }
}

}  // namespace millrace

#include "runtime/pool.h"

#include <pthread.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/cores.h"

namespace millrace {

namespace {

// Longer than the gap between two steps of a busy engine, shorter than anyone would notice on an idle one.
constexpr std::chrono::microseconds kSpin{50};

std::size_t checked(int threads, int first_core) {
  if (threads < 1 || threads > Pool::kMaxThreads) {
    throw std::invalid_argument("a pool has 1 to " + std::to_string(Pool::kMaxThreads) + " threads, not " +
                                std::to_string(threads));
  }
  if (first_core < 0) throw std::invalid_argument("first_core must not be negative: " + std::to_string(first_core));
  return static_cast<std::size_t>(threads);
}

}  // namespace

Pool::Pool(int threads, int first_core) : seats_(checked(threads, first_core)) {
  const std::vector<int> allowed = allowed_cores();
  const auto first = static_cast<std::size_t>(first_core);
  // Under a CPU quota the cores are everybody's: who shares the host would crowd the first ones.
  const bool own = static_cast<int>(allowed.size()) == available_cores();
  if (own && first + seats_.size() <= allowed.size()) {
    const auto begin = allowed.begin() + first_core;
    cores_.assign(begin, begin + threads);
  }
  // Who spins where threads outnumber cores keeps from running the thread waited for.
  if (threads <= available_cores() - first_core) spin_ = kSpin;
  try {
    workers_.reserve(seats_.size() - 1);
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back(&Pool::work, this, thread);
  } catch (...) {
    join();
    throw;
  }
}

Pool::~Pool() { join(); }

void Pool::join() noexcept {
  call_ = nullptr;
  started_.advance();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::start(Call call, const void* callable) {
  if (running_.exchange(true)) throw std::logic_error("Pool::run while the pool is running a job");
  if (!cores_.empty()) move_to(cores_.front());
  call_ = call;
  callable_ = callable;
  ended_ = 0;
  const std::uint32_t epoch = finished_.epoch.now();
  started_.advance();
  perform(0);
  finished_.epoch.wait(epoch, spin_);
  const std::exception_ptr error = failed_ ? recover() : nullptr;
  running_ = false;
  if (error) std::rethrow_exception(error);
}

void Pool::work(int thread) {
  pthread_setname_np(pthread_self(), ("millrace/" + std::to_string(thread)).c_str());
  if (!cores_.empty()) pin_to(cores_[static_cast<std::size_t>(thread)]);
  for (std::uint32_t epoch = 0;;) {
    epoch = started_.wait(epoch, spin_);
    if (call_ == nullptr) return;
    perform(thread);
  }
}

void Pool::perform(int thread) noexcept {
  Seat& mine = seats_[static_cast<std::size_t>(thread)];
  mine.loops = 0;
  try {
    call_(callable_, thread);
    // Whoever waits in a barrier now waits for this thread; see barrier for those who come later.
    ++ended_;
    if (barrier_.arrived != 0) throw std::logic_error(kUnevenBarriers);
  } catch (const Stop&) {
  } catch (...) {
    fail(std::current_exception());
  }
  finished_.arrive(size());
}

void Pool::barrier(int thread) {
  Seat& mine = seat(thread);
  mine.loops = 0;
  const std::uint32_t epoch = barrier_.epoch.now();
  if (failed_) throw Stop{};
  if (barrier_.arrive(size())) return;
  // One that went through this barrier and ended its job since has advanced the epoch before.
  if (ended_ != 0 && barrier_.epoch.now() == epoch) throw std::logic_error(kUnevenBarriers);
  barrier_.epoch.wait(epoch, spin_);
  if (failed_) throw Stop{};
}

bool Pool::Meeting::arrive(int size) {
  if (arrived.fetch_add(1) + 1 < size) return false;
  arrived.store(0, std::memory_order_relaxed);
  epoch.advance();
  return true;
}

// A thread that fails comes to no barrier any more, so no other advances the epoch: those who wait there are let go,
// and those who come later see failed_ first.
void Pool::fail(std::exception_ptr error) noexcept {
  if (failing_.exchange(true)) return;
  error_ = std::move(error);
  failed_ = true;
  barrier_.epoch.advance();
}

std::exception_ptr Pool::recover() {
  barrier_.arrived = 0;
  for (Counter& counter : counters_) counter.value = 0;
  for (Seat& one : seats_) one = Seat{};
  failed_ = failing_ = false;
  return std::exchange(error_, nullptr);
}

Pool::Seat& Pool::seat(int thread) {
  if (thread < 0 || thread >= size()) throw std::logic_error("the pool has no thread " + std::to_string(thread));
  if (!running_) throw std::logic_error("barrier and share are for inside a job");
  Seat& mine = seats_[static_cast<std::size_t>(thread)];
  if (mine.looping) throw std::logic_error("barrier or share inside a shared loop, or after one that threw");
  return mine;
}

Pool::Loop Pool::enter(int thread, std::int64_t count, std::int64_t grain) {
  Seat& mine = seat(thread);
  if (count < 0 || grain < 1) {
    throw std::invalid_argument("share needs count >= 0 and grain >= 1, not " + std::to_string(count) + " and " +
                                std::to_string(grain));
  }
  if (mine.loops == kLoops) barrier(thread);
  if (failed_) throw Stop{};
  const auto slot = static_cast<std::size_t>(mine.loops++);
  mine.looping = true;
  return {counters_[slot].value, mine.begins[slot], count / grain + (count % grain != 0)};
}

void Pool::leave(int thread, const Loop& loop) {
  Seat& mine = seats_[static_cast<std::size_t>(thread)];
  mine.begins[static_cast<std::size_t>(mine.loops - 1)] = loop.begin + loop.pieces + size();
  mine.looping = false;
}

}  // namespace millrace

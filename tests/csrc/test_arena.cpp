#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "expect.h"
#include "runtime/arena.h"

namespace {

using millrace::Arena;
using millrace::MemoryError;

// Small pages of the region that are memory already; -1 if part of it is not mapped.
long resident(void* begin, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages(bytes / page);
  if (mincore(begin, bytes, pages.data()) != 0) return -1;
  long count = 0;
  for (const unsigned char one : pages) count += one & 1;
  return count;
}

void parts_are_aligned_apart_and_zero() {
  Arena arena(3 * Arena::kPage + 1);
  expect(arena.capacity() == 4 * Arena::kPage, "capacity in whole huge pages");
  std::byte* end = nullptr;
  for (const std::size_t alignment : {std::size_t{64}, std::size_t{1}, std::size_t{4096}, Arena::kPage}) {
    for (const std::size_t bytes : {1U, 7U, 64U, 129U, 4097U}) {
      auto* const part = static_cast<std::byte*>(arena.allocate(bytes, alignment));
      expect(reinterpret_cast<std::uintptr_t>(part) % alignment == 0, "aligned");
      expect(part >= end, "apart");
      end = part + bytes;
      for (std::size_t i = 0; i < bytes; ++i) expect(part[i] == std::byte{0}, "zero");
      std::memset(part, 0xFF, bytes);
      if (alignment == Arena::kPage && bytes == 7U) return;
    }
  }
  expect(false, "the loop ends within the capacity");
}

void used_counts_bytes_and_a_full_arena_stays_as_it_was() {
  Arena arena(Arena::kPage);
  expect(arena.used() == 0, "nothing used at first");
  expect(reinterpret_cast<std::uintptr_t>(arena.allocate(100)) % Arena::kPage == 0, "starts at a huge page");
  const float* const values = arena.array<float>(10);
  expect(arena.used() == 128 + 40, "alignment counts, slack does not");
  expect(values[9] == 0, "the last value is there");
  expect_throws<MemoryError>([&arena] { arena.allocate(Arena::kPage); }, "too much");
  expect_throws<MemoryError>([&arena] { arena.allocate(SIZE_MAX); }, "more than there are addresses");
  expect_throws<MemoryError>([&arena] { arena.array<double>(SIZE_MAX / 8 + 2); }, "a product that overflows");
  expect(arena.used() == 168, "as before");
  arena.allocate(Arena::kPage - 192);
  expect(arena.used() == arena.capacity(), "used to the last byte");
  arena.allocate(0);
  expect_throws<MemoryError>([&arena] { arena.allocate(1, 1); }, "one byte too many");
}

void bad_requests_are_refused() {
  expect_throws<std::invalid_argument>([] { Arena{0}; }, "no capacity");
  Arena arena(1);
  for (const std::size_t alignment : {std::size_t{0}, std::size_t{3}, std::size_t{96}, 2 * Arena::kPage}) {
    expect_throws<std::invalid_argument>([&] { arena.allocate(1, alignment); }, "alignment");
  }
  for (const std::size_t capacity : {std::size_t{1} << 47, SIZE_MAX - 1, SIZE_MAX}) {
    try {
      Arena refused(capacity);
      expect(false, "more memory than there is");
    } catch (const std::bad_alloc& error) {
      expect(std::string(error.what()).find("MiB of memory") != std::string::npos, "the message says how much");
    }
  }
}

void pages_become_memory_when_written() {
  void* begin = nullptr;
  const std::size_t capacity = 4 * Arena::kPage;
  {
    Arena arena(capacity);
    begin = arena.allocate(capacity);
    expect(resident(begin, capacity) == 0, "no page is memory before it is written");
    static_cast<std::byte*>(begin)[Arena::kPage] = std::byte{1};
    const long pages = resident(begin, capacity);
    expect(pages >= 1 && pages <= resident(begin, Arena::kPage * 2), "the page written is");
  }
  expect(resident(begin, capacity) == -1 && errno == ENOMEM, "given back");
}

void moving_hands_the_region_over() {
  Arena first(Arena::kPage);
  void* const region = first.allocate(64);
  Arena second(std::move(first));
  expect(second.used() == 64 && second.capacity() == Arena::kPage, "moved with its count");
  Arena third(2 * Arena::kPage);
  void* const old = third.allocate(1);
  third = std::move(second);
  expect(resident(old, 2 * Arena::kPage) == -1, "the region assigned over is given back");
  expect(resident(region, Arena::kPage) == 0, "the region moved is not");
  expect(third.used() == 64 && third.capacity() == Arena::kPage, "assigned with its count");
}

}  // namespace

int main() {
  parts_are_aligned_apart_and_zero();
  used_counts_bytes_and_a_full_arena_stays_as_it_was();
  bad_requests_are_refused();
  pages_become_memory_when_written();
  moving_hands_the_region_over();
}

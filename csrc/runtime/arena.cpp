#include "runtime/arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <system_error>

namespace millrace {

namespace {

std::string mebibytes(std::size_t bytes) { return std::to_string((bytes >> 20) + (bytes % (1 << 20) != 0)) + " MiB"; }

MemoryError unmappable(std::size_t capacity, int error) {
  return MemoryError("cannot map " + mebibytes(capacity) + " of memory (" + std::generic_category().message(error) +
                     "): load a smaller model or one of lower precision, give the cache less, or free memory");
}

}  // namespace

// The kernel aligns a mapping to small pages: it is taken one huge page longer and cut at both ends.
Arena::Arena(std::size_t capacity) {
  if (capacity == 0) throw std::invalid_argument("an arena of no capacity");
  if (capacity > std::numeric_limits<std::size_t>::max() - 2 * kPage) throw unmappable(capacity, ENOMEM);
  const std::size_t length = (capacity + kPage - 1) / kPage * kPage;
  void* mapped = mmap(nullptr, length + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw unmappable(capacity, errno);
  auto* const start = static_cast<std::byte*>(mapped);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(start) % kPage;
  const std::size_t before = past == 0 ? 0 : kPage - past;
  if (before != 0) munmap(start, before);
  if (before != kPage) munmap(start + before + length, kPage - before);
  base_ = start + before;
  capacity_ = length;
  // A kernel without huge pages refuses: slower, not wrong.
  madvise(base_, capacity_, MADV_HUGEPAGE);
}

Arena::~Arena() {
  if (base_ != nullptr) munmap(base_, capacity_);
}

Arena::Arena(Arena&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      capacity_(std::exchange(other.capacity_, 0)),
      used_(std::exchange(other.used_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  Arena taken(std::move(other));
  std::swap(base_, taken.base_);
  std::swap(capacity_, taken.capacity_);
  std::swap(used_, taken.used_);
  return *this;
}

void* Arena::allocate(std::size_t bytes, std::size_t alignment) {
  if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment > kPage) {
    throw std::invalid_argument("alignment must be a power of two of at most 2 MiB, not " + std::to_string(alignment));
  }
  const std::size_t begin = (used_ + alignment - 1) & ~(alignment - 1);
  if (begin > capacity_ || bytes > capacity_ - begin) {
    throw MemoryError("the arena of " + mebibytes(capacity_) + " has no room for " + std::to_string(bytes) +
                      " bytes more: plan a larger one");
  }
  used_ = begin + bytes;
  return base_ + begin;
}

}  // namespace millrace

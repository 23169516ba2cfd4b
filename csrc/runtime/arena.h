// One region of memory for what lives as long as a model: weights, KV blocks, scratch.
#pragma once

#include <cstddef>
#include <limits>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

namespace millrace {

// Memory that was asked for and is not there; what() says how much and what to do.
class MemoryError : public std::bad_alloc {
 public:
  explicit MemoryError(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// Hands out parts of one mapping, in huge pages where the kernel has them, and gives all back when it ends. The
// mapping takes address space only: a page becomes memory, zeroed, near the thread that first writes to it.
// Threads must not allocate at once; what was handed out is theirs to use.
class Arena {
 public:
  static constexpr std::size_t kPage = std::size_t{2} << 20;  // bytes of a huge page; the region starts at a multiple
  static constexpr std::size_t kAlignment = 64;               // bytes of a cache line and of the widest vector

  // `capacity` in bytes, rounded up to whole huge pages.
  // Throws std::invalid_argument if it is 0 and MemoryError if it cannot be mapped.
  explicit Arena(std::size_t capacity);
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  // The next `bytes` bytes at a multiple of `alignment`, a power of two of at most kPage (std::invalid_argument).
  // Throws MemoryError if they do not fit; the arena is then as before.
  void* allocate(std::size_t bytes, std::size_t alignment = kAlignment);

  // `count` values, all bytes zero.
  template <class T>
  T* array(std::size_t count, std::size_t alignment = kAlignment) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kAlignment);
    if (count > std::numeric_limits<std::size_t>::max() / sizeof(T)) throw MemoryError("array of too many values");
    return static_cast<T*>(allocate(count * sizeof(T), alignment));
  }

  const std::byte* data() const { return base_; }
  std::size_t used() const { return used_; }          // bytes, alignment included
  std::size_t capacity() const { return capacity_; }  // bytes

 private:
  std::byte* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t used_ = 0;
};

}  // namespace millrace

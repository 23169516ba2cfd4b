#include "tile_scratch.h"

#include <memory>
#include <new>

namespace millrace {
namespace {

constexpr std::align_val_t kPage{4096};

struct Free {
  void operator()(std::byte* memory) const { operator delete(memory, kPage); }
};

}  // namespace

std::byte* tile_scratch(std::size_t bytes) {
  thread_local std::unique_ptr<std::byte, Free> memory;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    memory.reset(static_cast<std::byte*>(operator new(bytes, kPage)));
    size = bytes;
  }
  return memory.get();
}

}  // namespace millrace

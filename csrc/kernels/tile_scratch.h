// Working memory of products on tiles.
#pragma once

#include <cstddef>

namespace millrace {

// At least `bytes`, aligned to 4096; this thread's until its next call. Throws std::bad_alloc.
std::byte* tile_scratch(std::size_t bytes);

}  // namespace millrace

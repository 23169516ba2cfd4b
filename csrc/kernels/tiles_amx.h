// The tile instructions. tiles_emulated.h has the same names. Tiles and their shapes belong to the thread: whoever
// configures releases, so that nothing depends on what ran on the thread before.
//
// Spelled out, because the intrinsics of GCC (to 14 at least) are statements that do not tell the compiler which
// memory they read and write: it may drop or move stores to what a tile then loads.
#pragma once

#include <cstddef>

#include "tile_shapes.h"

namespace millrace {
namespace {
namespace tile {

inline void configure(const Shapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void release() { asm volatile("tilerelease"); }

// Rows `stride` bytes apart.
template <int t>
inline void load(const void* from, std::size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
}

// For what is read once: it need not stay in the caches.
template <int t>
inline void load_once(const void* from, std::size_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
}

template <int t>
inline void store(void* to, std::size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
}

template <int t>
inline void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(t));
}

// float32 C += bf16 A * bf16 B.
template <int c, int a, int b>
inline void multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// int32 C += int8 A * uint8 B.
template <int c, int a, int b>
inline void multiply_int8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace tile
}  // namespace
}  // namespace millrace

// What the machine can do at most: loops that do nothing but read memory, or nothing but multiply and add.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "millrace/isa.h"

namespace millrace::roof {

// A loop out of registers.
struct Compute {
  const char* arithmetic;  // of what is multiplied: fp32, bf16 or int8
  Isa isa;
  void (*run)(std::int64_t rounds);
  std::int64_t ops;  // of a round; a multiplication and its addition are two
};

// Those that this machine can run.
std::vector<Compute> compute_loops();

// Operations per second of `threads` pinned threads together: the best of the runs that `seconds` hold.
double measure_compute(const Compute& loop, int threads, double seconds);

// Bytes per second that `threads` pinned threads read together, each from its own part of `bytes` bytes in huge pages
// (where the kernel grants them), again and again: the best of the runs of 64 MiB that `seconds` hold.
// Throws std::bad_alloc.
double measure_read(std::size_t bytes, int threads, double seconds);

// The same of memory that is in use, all of it in each run: how fast it is read depends on where it lies, too.
// Throws std::invalid_argument where a thread would have less than 256 bytes to read.
double measure_read(const void* data, std::size_t bytes, int threads, double seconds);

}  // namespace millrace::roof

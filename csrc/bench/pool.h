// What the thread pool costs when it has nothing to do. On a busy machine the least of many measurements counts.
#pragma once

namespace millrace::bench {

// Nanoseconds of one barrier of `threads` threads: the least mean over 100 of `rounds` barriers in a row.
// Throws std::invalid_argument unless rounds >= 100.
double barrier_nanoseconds(int threads, int rounds);

// Likewise of one run of an empty job, the workers awake.
double run_nanoseconds(int threads, int rounds);

// Likewise of one share of a loop of one empty piece per thread, its barrier included.
double share_nanoseconds(int threads, int rounds);

// Processor time that each worker takes between two empty runs 2 ms apart, in microseconds, the mean of `rounds`: what
// it spins before it sleeps, and waking up. Throws std::invalid_argument unless threads >= 2 and rounds >= 1.
double idle_microseconds(int threads, int rounds);

}  // namespace millrace::bench

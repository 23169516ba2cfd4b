// The loops of each instruction set. The accumulators cover latency times throughput of the instruction.
//
// `read` takes `bytes`, a multiple of 256, from an address that is a multiple of 64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace millrace::roof {

namespace avx2 {
constexpr std::int64_t kAccumulators = 12;
void fp32(std::int64_t rounds);
void int8(std::int64_t rounds);
void read(const void* data, std::size_t bytes);
}  // namespace avx2

namespace avx512 {
constexpr std::int64_t kAccumulators = 16;
void fp32(std::int64_t rounds);
void int8(std::int64_t rounds);
void read(const void* data, std::size_t bytes);
}  // namespace avx512

namespace avx512_bf16 {
constexpr std::int64_t kAccumulators = 16;
void bf16(std::int64_t rounds);
}  // namespace avx512_bf16

namespace amx {
constexpr std::int64_t kAccumulators = 4;
void bf16(std::int64_t rounds);
void int8(std::int64_t rounds);
}  // namespace amx

}  // namespace millrace::roof

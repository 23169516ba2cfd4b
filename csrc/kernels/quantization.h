// Weights as integers: scales and zero points that minimise the squared error. kernels/reference/quantization.py is
// the definition.
//
// A channel (int8) or a group of it (int4) is w = s * d, d whole numbers: [-127, 127], or [0, 15] less a zero point in
// [0, 15]. Round-to-nearest takes s from the extremes; here s is searched for: a grid of clipped ranges, for each the
// codes, for these codes the best s in closed form (least squares, as the alternating minimisation of LAPQ and of
// k-quants in llama.cpp), and the best of all is refined the same way, with the neighbouring zero points. Each
// candidate is judged with the scale as it is stored (bf16 for int4), so the result is never worse than
// round-to-nearest.
//
// A vector lane is an output channel: every instruction set computes the same.
#pragma once

#include "millrace/matmul.h"

namespace millrace {

// Both pack block `block` of `matrix`; arguments as of pack_block. `scratch`: as many floats as scratch_floats().
// A function for each instruction set: quantization_<isa>.cpp.
struct Channels {
  const void* const* data;  // kColumns of them; null: not there
  Stored stored;
};
std::size_t quantization_scratch(const PackedMatrix& matrix);  // floats

bool quantize_int8_avx2(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);
bool quantize_int8_avx512(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);
bool quantize_int4_avx2(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);
bool quantize_int4_avx512(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);

}  // namespace millrace

// Weights as integers: scales and zero points that minimise the squared error. kernels/reference/quantization.py is
// the definition.
//
// A channel (int8) or a group of it (int4) is w = s * d, d whole numbers: [-127, 127], or [0, 15] less a zero point in
// [0, 15]. Round-to-nearest takes s from the extremes. Here, for int4, a grid of clipped ranges is tried: for each the
// codes, for these codes the best s in closed form (least squares); the best of all is refined the same way, with the
// neighbouring zero points. int8 has steps too fine for clipping to pay, and is refined only. The method is that of
// make_qkx2_quants of llama.cpp (ggml-quants.c), for whole zero points. Errors are those with the scale as it is stored
// (bf16 for int4), so the result is never worse than round-to-nearest.
//
// It is the transformed weights that are quantised: hadamard.h.
//
// A vector lane is an output channel: every instruction set computes the same.
#pragma once

#include "millrace/matmul.h"

namespace millrace {

// Numbers whose magnitudes, in a channel, group or row, are all below this become zeros: scales stay normal numbers.
inline constexpr float kLeastMagnitude = 0x1p-118F;

struct Channels {
  const void* const* data;  // kColumns of them; null: not there
  Stored stored;
};

inline constexpr std::int32_t kMostInputs = 128;  // of int4, gathered at once: whole groups, of 32 or 128

std::size_t quantization_scratch(const PackedMatrix& matrix);  // in floats

// Quantises and packs block `block` of `matrix`; false where a number is not finite.
bool quantize_int8_avx2(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);
bool quantize_int8_avx512(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);
bool quantize_int4_avx2(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);
bool quantize_int4_avx512(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch);

}  // namespace millrace

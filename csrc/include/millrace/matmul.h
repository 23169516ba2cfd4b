// Matrix products of activations with packed weights. kernels/reference/matmul.py is the definition.
//
// out[m, n] = epilogue(sum over k of x[m, k] * w[n, k]), with one arithmetic for each width and instruction set:
//   bf16  x rounded to bf16; products of pairs of k accumulated in float32, k ascending, one accumulator per output
//   int8  x and w as integers, exact int32 sums;    out = sx[m] * (sw[n] * float(sum_k x * (w - 128)))
//   int4  the same for each group of k:             out = sx[m] * fma over g of (sw[g, n] * float(dot_g - z[g, n] *
//   sum_g x))
// where x and w of integer widths are transformed before they are rounded (csrc/kernels/hadamard.h).
// So a result does not depend on the other rows, on how rows and blocks are divided, nor (integers) on the set.
//
// Weights are the unsigned operand (int8 as w + 128, int4 as 0..15), activations the signed one in [-127, 127].
#pragma once

#include <cstddef>
#include <cstdint>

#include "millrace/isa.h"

namespace millrace {

enum class Width { bf16, int8, int4 };
enum class Stored { float32, float16, bfloat16 };  // how a checkpoint holds numbers, little-endian
enum class Activation { none, silu, gelu, gelu_tanh, relu };

inline constexpr std::int32_t kColumns = 32;        // output channels of a block: two tiles of 16
inline constexpr std::int32_t kMaxInputs = 65'536;  // input channels: int32 sums of products of bytes stay exact

// Weights [n, k] in blocks of 32 channels, K innermost, so that a block is one contiguous read:
//   bf16  [n/32][k/32][2 tiles][16 pairs of k][16 channels][2]               k padded to 32
//   int8  [n/32][k/64][2 tiles][16 quads of k][16 channels][4] as w + 128    k padded to 64
//   int4  [n/32][k/64][16 quads of k][16 channels][4], channel c in the low nibble, 16 + c in the high one
// Padding is what multiplies to zero: w = 0; beyond n too. Scales of int8: float32 [n/32][32]. Of int4: bf16
// [n/32][groups][32], zeros uint8 [n/32][groups][32], the groups being those of the padded k. Owns nothing.
struct PackedMatrix {
  Width width;
  std::int32_t n;       // output channels
  std::int32_t k;       // input channels
  std::int32_t group;   // int4: 32 or 128; else 0
  std::byte* data;      // 64-byte aligned
  void* scales;         // null for bf16; 64-byte aligned
  std::uint8_t* zeros;  // int4; else null
};

std::int32_t blocks(const PackedMatrix& matrix);  // n / 32, rounded up

// Bytes of each part; multiples of 64.
struct PackedBytes {
  std::size_t data, scales, zeros;
};
PackedBytes packed_bytes(Width width, std::int32_t n, std::int32_t k, std::int32_t group);

// Throws std::invalid_argument: n or k < 1, k > kMaxInputs, a group that is not 32 or 128 (or not 0 where there is
// none).
void check_shape(Width width, std::int32_t n, std::int32_t k, std::int32_t group);

// Writes one block from 32 channels, each `k` contiguous stored numbers, null for a channel that is not there.
// Integer widths choose scales (and zeros) that minimise the error: quantization.h. Different blocks may be
// packed by different threads. Returns false where a number is NaN or infinite.
bool pack_block(const PackedMatrix& matrix, std::int32_t block, const void* const channels[kColumns], Stored stored,
                Isa isa);

// Channels back as float32 [n, k], for tests and for embedding look-ups: row `channel` into out[k].
void unpack_channel(const PackedMatrix& matrix, std::int32_t channel, float* out, Isa isa);

// Rows of activations in the form that weights of `width` meet.
struct Activations {
  Width width;
  std::int32_t group;  // that of the weights
  std::int32_t rows;
  std::int32_t k;
  std::byte* data;        // bf16 or int8 [rows][row_bytes]; zeros behind k; 64-byte aligned
  std::size_t row_bytes;  // multiple of 64
  float* scales;          // integers: [rows]; value = scale * data
  std::int32_t* sums;     // integers: [rows][groups] of data; int8 has one group
};
std::size_t activation_row_bytes(Width width, std::int32_t k);
std::int32_t activation_groups(Width width, std::int32_t k, std::int32_t group);  // of the padded k; bf16 has none

// Rounds (bf16) or transforms and quantises (integers: scale = max |x| / 127, round to nearest even) one row of k.
// Integers: a row of magnitudes below 2^-118 becomes zeros with scale 0; one that holds NaN or infinity, or overflows
// when transformed, zeros with scale NaN.
void encode_row(const Activations& to, std::int32_t row, const float* x, Isa isa);
void encode_row_bf16(const Activations& to, std::int32_t row, const std::uint16_t* x, Isa isa);

// What becomes of the sums. Bias comes before everything else; null: none. It is in order of packed channels.
enum class Epilogue {
  store,     // out[m, n] = sum
  add,       // out[m, n] += sum
  activate,  // half[m, n] = activation(sum)
  gate,      // half[m, c] = activation(gate) * up: tile 0 of each block holds 16 gates, tile 1 the same 16 ups;
             // n is a multiple of 32, channels that fill it up give zeros
};
struct MatmulOutput {
  Epilogue epilogue;
  Activation activation;  // of activate and gate
  const float* bias;      // [n]
  float* out;             // store, add: float32 [rows][stride]
  std::uint16_t* half;    // activate, gate: bf16 [rows][stride]; gate writes n / 2 columns
  std::int64_t stride;    // numbers
};

// Computes rows [first_row, last_row) of blocks [first_block, last_block) on the calling thread.
// Throws std::invalid_argument on Isa::baseline, as does encode_row: both need AVX2.
void matmul(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, std::int32_t first_row,
            std::int32_t last_row, std::int32_t first_block, std::int32_t last_block, Isa isa);

}  // namespace millrace

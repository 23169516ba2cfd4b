// What each width has for each instruction set. One function to a file: matmul_<width>_<isa>.cpp.
#pragma once

#include "millrace/matmul.h"

namespace millrace {

struct Ranges {
  std::int32_t first_row, last_row, first_block, last_block;
};

using MatmulKernel = void (*)(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);

void matmul_bf16_avx2(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_bf16_avx512(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_bf16_avx512_bf16(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_bf16_amx(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_bf16_amx_emulated(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);

void matmul_int8_avx2(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_int8_avx512(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_int8_amx(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_int8_amx_emulated(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);

void matmul_int4_avx2(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_int4_avx512(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_int4_amx(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);
void matmul_int4_amx_emulated(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges);

}  // namespace millrace

// Rows of activations for each width: encode_<width>_<isa>.cpp. Every byte of the row is written, zeros behind k.
#pragma once

#include "millrace/matmul.h"

namespace millrace {

void encode_bf16_avx2(const Activations& to, std::int32_t row, const float* x);
void encode_bf16_avx512(const Activations& to, std::int32_t row, const float* x);

// int8, for weights of int8 and int4; from float32 and from bf16.
void encode_int_avx2(const Activations& to, std::int32_t row, const float* x);
void encode_int_avx2(const Activations& to, std::int32_t row, const std::uint16_t* x);
void encode_int_avx512(const Activations& to, std::int32_t row, const float* x);
void encode_int_avx512(const Activations& to, std::int32_t row, const std::uint16_t* x);

}  // namespace millrace

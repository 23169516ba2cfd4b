// How each width is packed: pack_<width>.cpp. Arguments as in millrace/matmul.h; shapes were checked.
#pragma once

#include "millrace/matmul.h"

namespace millrace {

// `count` stored numbers as float32; false where one is NaN or infinite.
bool to_float32(const void* from, Stored stored, std::int32_t count, float* to);

bool pack_bf16(const PackedMatrix& matrix, std::int32_t block, const void* const* channels, Stored stored);
bool pack_int8(const PackedMatrix& matrix, std::int32_t block, const void* const* channels, Stored stored, Isa isa);
bool pack_int4(const PackedMatrix& matrix, std::int32_t block, const void* const* channels, Stored stored, Isa isa);

void unpack_bf16(const PackedMatrix& matrix, std::int32_t channel, float* out);
void unpack_int8(const PackedMatrix& matrix, std::int32_t channel, float* out, Isa isa);
void unpack_int4(const PackedMatrix& matrix, std::int32_t channel, float* out, Isa isa);

}  // namespace millrace

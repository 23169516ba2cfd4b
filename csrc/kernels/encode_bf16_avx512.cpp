#include "simd_avx512.h"
// After the vectors.
#include "encode_bf16_body.h"

namespace millrace {

void encode_bf16_avx512(const Activations& to, std::int32_t row, const float* x) { encode_bf16(to, row, x); }

}  // namespace millrace

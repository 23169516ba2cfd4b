#include "simd_int_avx2.h"
// The vectors come first.
#include "encode_int_body.h"

namespace millrace {

void encode_int_avx2(const Activations& to, std::int32_t row, const float* x) { encode(to, row, x); }
void encode_int_avx2(const Activations& to, std::int32_t row, const std::uint16_t* x) { encode(to, row, x); }

}  // namespace millrace

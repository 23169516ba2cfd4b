#include "simd_int_avx2.h"
// The vectors come first.
#include "quantization_body.h"

namespace millrace {

bool quantize_int8_avx2(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch) {
  return quantize_int8(matrix, block, channels, scratch);
}

bool quantize_int4_avx2(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch) {
  return quantize_int4(matrix, block, channels, scratch);
}

}  // namespace millrace

#include "simd_avx512.h"
// After the vectors.
#include "matmul_bf16_widened_body.h"

namespace millrace {

void matmul_bf16_avx512(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges) {
  matmul_bf16<WidenedMultiply<12, 3>>(weights, x, output, ranges);
}

}  // namespace millrace

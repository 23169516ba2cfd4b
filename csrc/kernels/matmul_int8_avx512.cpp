#include "matmul_int_avx512.h"
// The vectors come first.
#include "matmul_int8_body.h"

namespace millrace {

void matmul_int8_avx512(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges) {
  matmul_int8(weights, x, output, ranges);
}

}  // namespace millrace

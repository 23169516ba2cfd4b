#include "matmul_int_avx2.h"
// The vectors come first.
#include "matmul_int4_body.h"

namespace millrace {

void matmul_int4_avx2(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges) {
  matmul_int4(weights, x, output, ranges);
}

}  // namespace millrace

#include "simd_avx512.h"
#include "tiles_amx.h"
// Over those vectors and tiles:
#include "matmul_bf16_amx_body.h"

namespace millrace {

void matmul_bf16_amx(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges) {
  WholeTiles<Bf16Tiles>(weights, x, output).run(ranges);
}

}  // namespace millrace

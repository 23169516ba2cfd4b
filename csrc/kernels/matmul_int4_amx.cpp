#include "simd_avx512.h"
#include "tiles_amx.h"
// Over those vectors and tiles:
#include "matmul_int4_amx_body.h"

namespace millrace {

void matmul_int4_amx(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, Ranges ranges) {
  GroupedTiles(weights, x, output).run(ranges);
}

}  // namespace millrace

#include "simd_avx512.h"
#include "tiles_emulated.h"
// Over those vectors and tiles:
#include "matmul_int8_amx_body.h"

namespace millrace {

void matmul_int8_amx_emulated(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output,
                              Ranges ranges) {
  WholeTiles<Int8Tiles>(weights, x, output).run(ranges);
}

}  // namespace millrace

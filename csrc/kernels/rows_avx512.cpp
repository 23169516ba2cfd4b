#include "simd_avx512.h"
// Over those vectors:
#include "rows_body.h"

namespace millrace {

const RowKernels kRowsAvx512 = kRowKernels;

}  // namespace millrace

#include "simd_avx2.h"
// Over those vectors:
#include "rows_body.h"

namespace millrace {

const RowKernels kRowsAvx2 = kRowKernels;

}  // namespace millrace

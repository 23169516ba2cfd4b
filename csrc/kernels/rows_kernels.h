// The row kernels of one instruction set: rows_<isa>.cpp. The arguments are those of rows.h.
#pragma once

#include "millrace/rows.h"

namespace millrace {

struct RowKernels {
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int32_t size, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, std::int32_t size, float* out);
  void (*rotate)(float* x, std::int32_t heads, std::int32_t dim, const float* cosine, const float* sine);
  void (*embed)(const void* row, Stored stored, std::int32_t size, bool accumulate, float* out);
  void (*add)(const float* x, std::int32_t size, float* out);
  void (*mean)(const float* x, std::int64_t stride, std::int32_t rows, std::int32_t size, float* out);
  void (*normalize)(float* x, std::int32_t size);
  void (*activate)(Activation activation, const float* x, std::int32_t size, float* out);
  void (*exp)(const float* x, std::int32_t size, float* out);
};

extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;

}  // namespace millrace

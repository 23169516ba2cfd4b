#include "millrace/rows.h"

#include <stdexcept>

#include "rows_kernels.h"

namespace millrace {
namespace {

const RowKernels& kernels(Isa isa) {
  if (isa == Isa::baseline) throw std::invalid_argument("norms, positions and embeddings need AVX2");
  return isa == Isa::avx2 ? kRowsAvx2 : kRowsAvx512;
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, std::int32_t size, float* out, Isa isa) {
  kernels(isa).rms_norm(x, weight, eps, size, out);
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int32_t size, float* out,
                Isa isa) {
  kernels(isa).layer_norm(x, weight, bias, eps, size, out);
}

void rotate(float* x, std::int32_t heads, std::int32_t dim, const float* cosine, const float* sine, Isa isa) {
  kernels(isa).rotate(x, heads, dim, cosine, sine);
}

void embed_row(const void* row, Stored stored, std::int32_t size, bool accumulate, float* out, Isa isa) {
  kernels(isa).embed(row, stored, size, accumulate, out);
}

void add_row(const float* x, std::int32_t size, float* out, Isa isa) { kernels(isa).add(x, size, out); }

void mean_rows(const float* x, std::int64_t stride, std::int32_t rows, std::int32_t size, float* out, Isa isa) {
  kernels(isa).mean(x, stride, rows, size, out);
}

void normalize(float* x, std::int32_t size, Isa isa) { kernels(isa).normalize(x, size); }

void activate_row(Activation activation, const float* x, std::int32_t size, float* out, Isa isa) {
  kernels(isa).activate(activation, x, size, out);
}

void exp_row(const float* x, std::int32_t size, float* out, Isa isa) { kernels(isa).exp(x, size, out); }

}  // namespace millrace

// The row kernels over the vectors of simd_*.h, which is included before.
#pragma once

#include "rows_kernels.h"
#include "simd_math.h"

namespace millrace {
namespace {

// What stored 16-bit numbers are read as.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
inline F32 load(const BFloat16* p) { return load_bf16(&p->bits); }
inline F32 load(const BFloat16* p, std::int32_t n) { return load_bf16(&p->bits, n); }
inline F32 load(const Float16* p) { return load_f16(&p->bits); }
inline F32 load(const Float16* p, std::int32_t n) { return load_f16(&p->bits, n); }

// A whole vector of a row, or the one that the row ends in, whose other lanes are zero.
struct Whole {
  template <typename T>
  F32 load(const T* p) const {
    return millrace::load(p);
  }
  void store(float* p, F32 x) const { millrace::store(p, x); }
};
struct Part {
  std::int32_t count;
  template <typename T>
  F32 load(const T* p) const {
    return millrace::load(p, count);
  }
  void store(float* p, F32 x) const { millrace::store(p, x, count); }
};

// Calls body(first element, Whole or Part) for the vectors of a row.
template <typename Body>
inline void each_vector(std::int32_t size, Body body) {
  std::int32_t i = 0;
  for (; size - i >= kLanes; i += kLanes) body(i, Whole{});
  if (i < size) body(i, Part{size - i});
}

// Sums in float32: element i goes to partial sum i % 64; then halves, quarters and so on are added, on every
// instruction set. term(sum, i, lanes) adds the vector at i to a vector of partial sums.
template <typename Term>
inline float reduce(std::int32_t size, Term term) {
  constexpr std::int32_t kPartials = 64, kVectors = kPartials / kLanes;
  F32 sums[kVectors];
  for (F32& partial : sums) partial = zero();
  std::int32_t i = 0;
  for (; size - i >= kPartials; i += kPartials) {
    for (std::int32_t j = 0; j < kVectors; ++j) sums[j] = term(sums[j], i + j * kLanes, Whole{});
  }
  each_vector(size - i, [&](std::int32_t at, auto lanes) {
    F32& partial = sums[at / kLanes];
    partial = term(partial, i + at, lanes);
  });
  for (std::int32_t half = kVectors / 2; half > 0; half /= 2) {
    for (std::int32_t j = 0; j < half; ++j) sums[j] = sums[j] + sums[j + half];
  }
  return sum(sums[0]);
}

inline float sum(const float* x, std::int32_t size) {
  return reduce(size, [x](F32 partial, std::int32_t i, auto lanes) { return partial + lanes.load(x + i); });
}

inline float sum_of_squares(const float* x, std::int32_t size) {
  return reduce(size, [x](F32 partial, std::int32_t i, auto lanes) {
    const F32 value = lanes.load(x + i);
    return fma(value, value, partial);
  });
}

inline F32 inverse_deviation(float squares, std::int32_t size, float eps) {
  return fill(1.0F) / sqrt(fill(squares / static_cast<float>(size) + eps));
}

void rms_norm(const float* x, const float* weight, float eps, std::int32_t size, float* out) {
  const F32 scale = inverse_deviation(sum_of_squares(x, size), size, eps);
  each_vector(size, [&](std::int32_t i, auto lanes) {
    lanes.store(out + i, lanes.load(weight + i) * (lanes.load(x + i) * scale));
  });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int32_t size, float* out) {
  const F32 mean = fill(sum(x, size) / static_cast<float>(size));
  each_vector(size, [&](std::int32_t i, auto lanes) { lanes.store(out + i, lanes.load(x + i) - mean); });
  const F32 scale = inverse_deviation(sum_of_squares(out, size), size, eps);
  each_vector(size, [&](std::int32_t i, auto lanes) {
    lanes.store(out + i, fma(lanes.load(out + i) * scale, lanes.load(weight + i), lanes.load(bias + i)));
  });
}

void rotate(float* x, std::int32_t heads, std::int32_t dim, const float* cosine, const float* sine) {
  const std::int32_t half = dim / 2;
  for (std::int32_t head = 0; head < heads; ++head, x += dim) {
    each_vector(half, [&](std::int32_t i, auto lanes) {
      const F32 first = lanes.load(x + i), second = lanes.load(x + half + i);
      const F32 c = lanes.load(cosine + i), s = lanes.load(sine + i);
      lanes.store(x + i, first * c - second * s);
      lanes.store(x + half + i, second * c + first * s);
    });
  }
}

void add(const float* x, std::int32_t size, float* out) {
  each_vector(size, [&](std::int32_t i, auto lanes) { lanes.store(out + i, lanes.load(out + i) + lanes.load(x + i)); });
}

template <typename T>
inline void embed_as(const T* row, std::int32_t size, bool accumulate, float* out) {
  each_vector(size, [&](std::int32_t i, auto lanes) {
    const F32 value = lanes.load(row + i);
    lanes.store(out + i, accumulate ? lanes.load(out + i) + value : value);
  });
}

void embed(const void* row, Stored stored, std::int32_t size, bool accumulate, float* out) {
  switch (stored) {
    case Stored::float32:
      return embed_as(static_cast<const float*>(row), size, accumulate, out);
    case Stored::float16:
      return embed_as(static_cast<const Float16*>(row), size, accumulate, out);
    case Stored::bfloat16:
      return embed_as(static_cast<const BFloat16*>(row), size, accumulate, out);
  }
}

void mean(const float* x, std::int64_t stride, std::int32_t rows, std::int32_t size, float* out) {
  embed_as(x, size, false, out);
  for (std::int32_t row = 1; row < rows; ++row) add(x + row * stride, size, out);
  const F32 count = fill(static_cast<float>(rows));
  each_vector(size, [&](std::int32_t i, auto lanes) { lanes.store(out + i, lanes.load(out + i) / count); });
}

void normalize(float* x, std::int32_t size) {
  F32 highest = zero();
  each_vector(size, [&](std::int32_t i, auto lanes) { highest = max(highest, abs(lanes.load(x + i))); });
  const float largest = maximum(highest);
  if (largest == 0.0F) return;
  // Divided by the largest first, so that no square overflows or vanishes.
  each_vector(size, [&](std::int32_t i, auto lanes) { lanes.store(x + i, lanes.load(x + i) / fill(largest)); });
  const F32 length = sqrt(fill(sum_of_squares(x, size)));
  each_vector(size, [&](std::int32_t i, auto lanes) { lanes.store(x + i, lanes.load(x + i) / length); });
}

void activate(Activation activation, const float* x, std::int32_t size, float* out) {
  each_vector(size, [&](std::int32_t i, auto lanes) { lanes.store(out + i, activate(activation, lanes.load(x + i))); });
}

void exp(const float* x, std::int32_t size, float* out) {
  each_vector(size, [&](std::int32_t i, auto lanes) { lanes.store(out + i, exp(lanes.load(x + i))); });
}

constexpr RowKernels kRowKernels{rms_norm, layer_norm, rotate, embed, add, mean, normalize, activate, exp};

}  // namespace
}  // namespace millrace

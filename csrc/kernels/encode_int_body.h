// Rows of activations as int8, the same for each instruction set. simd_int_*.h is included before.
#pragma once

#include "hadamard_body.h"
#include "matmul_encode.h"
#include "quantization.h"

namespace millrace {
namespace {

inline F32 read(const float* p) { return load(p); }
inline F32 read(const float* p, std::int32_t n) { return load(p, n); }
inline F32 read(const std::uint16_t* p) { return load_bf16(p); }
inline F32 read(const std::uint16_t* p, std::int32_t n) { return load_bf16(p, n); }

struct Scale {
  float scale, inverse;
};

// Numbers as products meet them (hadamard.h), zeros in the lanes behind k, and the scale of the row. Not a
// number in the row: neither is the scale, nor what is computed with it.
template <typename Number>
inline Scale transform_row(const Number* x, std::int32_t k, float* to) {
  F32 largest = zero();
  F32 poison = zero();
  const auto put = [&](std::int32_t i, F32 value) {
    largest = max(largest, abs(value));
    poison = fma(value, zero(), poison);
    store(to + i, value);
  };
  const std::int32_t whole = k / kHadamard * kHadamard;
  for (std::int32_t i = 0; i < whole; i += kHadamard) {
    F32 values[kHadamardVectors];
#pragma GCC unroll 8
    for (std::int32_t v = 0; v < kHadamardVectors; ++v) values[v] = read(x + i + v * kLanes);
    transform(values);
#pragma GCC unroll 8
    for (std::int32_t v = 0; v < kHadamardVectors; ++v) put(i + v * kLanes, values[v]);
  }
  for (std::int32_t i = whole; i < k; i += kLanes) put(i, k - i >= kLanes ? read(x + i) : read(x + i, k - i));
  const float most = maximum(largest);
  const float none = sum(poison);
  if (none != 0.0F) return {none, 0.0F};
  if (most < kLeastMagnitude) return {0.0F, 0.0F};
  return {most / 127.0F, 127.0F / most};
}

template <typename Number>
inline void encode(const Activations& to, std::int32_t row, const Number* x) {
  const std::int32_t groups = activation_groups(to.width, to.k, to.group);
  const auto row_bytes = static_cast<std::int32_t>(to.row_bytes);
  auto* data = reinterpret_cast<std::int8_t*>(to.data + static_cast<std::size_t>(row) * to.row_bytes);
  // On the stack, but no more of it than this row needs: threads may have little.
  auto* values = static_cast<float*>(
      __builtin_alloca(static_cast<std::size_t>((to.k + kLanes - 1) / kLanes * kLanes) * sizeof(float)));
  const Scale scale = transform_row(x, to.k, values);
  to.scales[row] = scale.scale;
  const std::int32_t k = scale.scale == scale.scale ? to.k : 0;
  for (std::int32_t i = 0; i < row_bytes; i += kLanes) {
    store_bytes(data + i, i < k ? to_int(load(values + i) * fill(scale.inverse)) : fill(0));
  }
  std::int32_t* sums = to.sums + static_cast<std::size_t>(row) * static_cast<std::size_t>(groups);
  const std::int32_t group = to.width == Width::int8 ? row_bytes : to.group;
  for (std::int32_t g = 0; g < groups; ++g) {
    I32 total = fill(0);
    for (std::int32_t i = g * group; i < (g + 1) * group && i < row_bytes; i += kLanes) {
      total = total + load_bytes(data + i);
    }
    sums[g] = sum(total);
  }
}

}  // namespace
}  // namespace millrace

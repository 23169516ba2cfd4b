// Rows of activations as int8, the same for each instruction set. simd_int_*.h is included before.
#pragma once

#include "matmul_encode.h"
#include "quantization.h"

namespace millrace {
namespace {

inline F32 read(const float* p) { return load(p); }
inline F32 read(const float* p, std::int32_t n) { return load(p, n); }
inline F32 read(const std::uint16_t* p) { return load_bf16(p); }
inline F32 read(const std::uint16_t* p, std::int32_t n) { return load_bf16(p, n); }

// Numbers i, i + 1, ... of k; zeros behind them.
template <typename Number>
inline F32 read(const Number* x, std::int32_t i, std::int32_t k) {
  if (k - i >= kLanes) return read(x + i);
  return i < k ? read(x + i, k - i) : zero();
}

struct Scale {
  float scale, inverse;
};

// Not a number in the row: neither is the scale, nor what is computed with it.
template <typename Number>
inline Scale scale_of(const Number* x, std::int32_t k) {
  F32 largest = zero();
  F32 poison = zero();
  for (std::int32_t i = 0; i < k; i += kLanes) {
    const F32 values = read(x, i, k);
    largest = max(largest, abs(values));
    poison = fma(values, zero(), poison);
  }
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
  const std::int32_t group = to.width == Width::int8 ? row_bytes : to.group;
  auto* data = reinterpret_cast<std::int8_t*>(to.data + static_cast<std::size_t>(row) * to.row_bytes);
  std::int32_t* sums = to.sums + static_cast<std::size_t>(row) * static_cast<std::size_t>(groups);
  const Scale scale = scale_of(x, to.k);
  to.scales[row] = scale.scale;
  const bool number = scale.scale == scale.scale;
  std::int32_t i = 0;
  for (std::int32_t g = 0; g < groups; ++g) {
    I32 total = fill(0);
    for (const std::int32_t end = i + group < row_bytes ? i + group : row_bytes; i < end; i += kLanes) {
      const I32 values = number ? to_int(read(x, i, to.k) * fill(scale.inverse)) : fill(0);
      store_bytes(data + i, values);
      total = total + values;
    }
    sums[g] = sum(total);
  }
  for (; i < row_bytes; i += kLanes) store_bytes(data + i, fill(0));
}

}  // namespace
}  // namespace millrace

// Rows of activations as bf16. simd_*.h is included before.
#pragma once

#include "matmul_encode.h"

namespace millrace {
namespace {

inline void encode_bf16(const Activations& to, std::int32_t row, const float* x) {
  auto* halves = reinterpret_cast<std::uint16_t*>(to.data + static_cast<std::size_t>(row) * to.row_bytes);
  const auto end = static_cast<std::int32_t>(to.row_bytes / sizeof(std::uint16_t));
  std::int32_t k = 0;
  for (; k + kLanes <= to.k; k += kLanes) store_bf16(halves + k, load(x + k));
  if (k < to.k) {
    store_bf16(halves + k, load(x + k, to.k - k));
    k += kLanes;
  }
  for (; k < end; k += kLanes) store_bf16(halves + k, zero());
}

}  // namespace
}  // namespace millrace

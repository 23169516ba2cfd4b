// The search of quantization.h over lanes. simd_int_*.h is included before.
#pragma once

#include "quantization.h"

namespace millrace {
namespace {

inline F32 round_to_bf16(F32 x) {
  const I32 b = bits(x);
  const I32 odd = shift_right(b, 16) & fill(1);
  return from_bits((b + odd + fill(0x7fff)) & fill(-0x10000));
}

// What a lane becomes: values are divided by `largest`, the scale stored is near `step * largest`.
struct Lanes {
  F32 largest, inverse;  // of the largest magnitude; both 0 where there is none to speak of
  F32 low, high;         // extremes of the values divided, and 0
};

// Divides the `count` vectors at `w` by the largest magnitude of each lane.
inline Lanes normalize(float* w, std::int32_t count) {
  F32 low = zero();
  F32 high = zero();
  for (std::int32_t i = 0; i < count; ++i) {
    low = min(low, load(w + i * kLanes));
    high = max(high, load(w + i * kLanes));
  }
  const F32 largest = max(high, zero() - low);
  const F32 least = fill(kLeastMagnitude);
  const F32 inverse = where_less(largest, least, zero(), fill(1.0F) / max(largest, least));
  for (std::int32_t i = 0; i < count; ++i) store(w + i * kLanes, load(w + i * kLanes) * inverse);
  return {where_less(largest, least, zero(), largest), inverse, low * inverse, high * inverse};
}

// Codes d of value w are round(w / step) within [least, most].
struct Codes {
  F32 step, least, most;
};

inline F32 inverse_of(F32 step) { return where_less(zero(), step, fill(1.0F) / step, zero()); }
inline F32 code(F32 w, F32 inverse_step, const Codes& codes) {
  return min(max(round(w * inverse_step), codes.least), codes.most);
}

// The best found so far, and its squared error.
struct Best {
  Codes codes;
  F32 error;
};

// Tries kCount candidates at once. Sums are those of residuals, which lose nothing where errors are small: with codes d
// and residuals r = w - step * d, moving the step by x changes the error by x * (x * sum d^2 - 2 * sum r d).
// `stored` rounds a step as it will be stored.
template <std::int32_t kCount, typename Rounding>
inline void try_codes(const float* w, std::int32_t count, const Codes (&candidates)[kCount], const Rounding& stored,
                      Best& best) {
  F32 inverse[kCount];
  F32 errors[kCount];
  F32 products[kCount];  // of residuals and codes
  F32 squares[kCount];   // of codes
  for (std::int32_t c = 0; c < kCount; ++c) {
    inverse[c] = inverse_of(candidates[c].step);
    errors[c] = products[c] = squares[c] = zero();
  }
  for (std::int32_t i = 0; i < count; ++i) {
    const F32 value = load(w + i * kLanes);
#pragma GCC unroll 8
    for (std::int32_t c = 0; c < kCount; ++c) {
      const F32 d = code(value, inverse[c], candidates[c]);
      const F32 residual = fma(zero() - candidates[c].step, d, value);
      errors[c] = fma(residual, residual, errors[c]);
      products[c] = fma(residual, d, products[c]);
      squares[c] = fma(d, d, squares[c]);
    }
  }
  for (std::int32_t c = 0; c < kCount; ++c) {
    const F32 step = stored(candidates[c].step + products[c] / max(squares[c], fill(1.0F)));
    const F32 move = step - candidates[c].step;
    const F32 error = fma(move, fma(move, squares[c], zero() - (products[c] + products[c])), errors[c]);
    const auto better = [&](F32 yes, F32 no) { return where_less(error, best.error, yes, no); };
    best.codes.step = better(step, best.codes.step);
    best.codes.least = better(candidates[c].least, best.codes.least);
    best.codes.most = better(candidates[c].most, best.codes.most);
    best.error = better(error, best.error);
  }
}

}  // namespace
}  // namespace millrace

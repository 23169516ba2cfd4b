// Elementary functions over the vectors of simd_*.h, which is included before. The same operations on every width:
// a number maps to the same result on each instruction set. Infinities give the limits, NaN alone gives NaN. Errors are
// measured against double precision over all exponents.
#pragma once

#include "millrace/matmul.h"

namespace millrace {
namespace {

// e^x by range reduction to |r| <= ln 2 / 2 and a polynomial of degree 6 (Cody and Waite's reduction; coefficients of
// Cephes expf). Within 1.01 units in the last place on [-87, 88.7]; 0 below, infinity above.
inline F32 exp(F32 x) {
  const F32 bounded = min(fill(89.0F), x);
  const F32 n = round(bounded * fill(1.44269504F));
  F32 r = fma(n, fill(-0.693359375F), bounded);
  r = fma(n, fill(2.12194440e-4F), r);
  F32 p = fill(1.9875691500e-4F);
  p = fma(p, r, fill(1.3981999507e-3F));
  p = fma(p, r, fill(8.3334519073e-3F));
  p = fma(p, r, fill(4.1665795894e-2F));
  p = fma(p, r, fill(1.6666665459e-1F));
  p = fma(p, r, fill(5.0000001201e-1F));
  const F32 near = fma(p * r, r, r) + fill(1.0F);
  return where_less(x, fill(-87.0F), zero(), scale_by_power(near, max(n, fill(-126.0F))));
}

// x / (1 + e^-y).
inline F32 gate(F32 x, F32 y) { return x / (fill(1.0F) + exp(zero() - y)); }

// Within 3 units in the last place above -87, and 0 from -88.73. Below that x is bounded, for the limit of -infinity.
inline F32 silu(F32 x) {
  const F32 bounded = max(fill(-100.0F), x);
  return gate(bounded, bounded);
}

// (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), which loses nothing where tanh is near -1: within 2.5e-7 of itself above -1,
// 1.3e-5 above -10, where rounding u shows in its power; below that less than 1e-37.
inline F32 gelu_tanh(F32 x) {
  const F32 bounded = max(fill(-20.0F), x);
  return gate(bounded, fill(1.595769122F) * fma(fill(0.044715F) * bounded * bounded, bounded, bounded));
}

// x for x > 0, less |x| erfc(|x| / sqrt 2) / 2, which is e^(-x^2 / 2) times a polynomial in 1 / (1 + 0.28 |x|) (the
// form of Abramowitz and Stegun 7.1.26; coefficients of the least relative error, 6e-8). Within 6e-7 of itself above
// -3, 5e-6 above -13, where rounding x^2 shows in its power; 0 from -13.2 on.
inline F32 gelu(F32 x) {
  const F32 size = min(fill(20.0F), abs(x));
  const F32 t = fill(1.0F) / fma(size, fill(0.28F), fill(1.0F));
  F32 p = fill(2.279094793e-2F);
  p = fma(p, t, fill(-8.336370438e-2F));
  p = fma(p, t, fill(6.977759302e-2F));
  p = fma(p, t, fill(2.084291354e-2F));
  p = fma(p, t, fill(5.326212198e-2F));
  p = fma(p, t, fill(9.207747877e-2F));
  p = fma(p, t, fill(1.009306014e-1F));
  p = fma(p, t, fill(1.119948104e-1F));
  p = fma(p, t, fill(1.116872653e-1F));
  return max(zero(), x) - size * (p * t * exp(fill(-0.5F) * size * size));
}

inline F32 activate(Activation activation, F32 x) {
  switch (activation) {
    case Activation::silu:
      return silu(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::relu:
      return max(zero(), x);
    case Activation::none:
      break;
  }
  return x;
}

}  // namespace
}  // namespace millrace

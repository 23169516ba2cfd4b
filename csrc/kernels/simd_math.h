// Elementary functions over the vectors of simd_*.h, which is included before. The same operations on every width:
// a number maps to the same result on each instruction set.
#pragma once

#include "millrace/matmul.h"

namespace millrace {
namespace {

// e^x by range reduction to |r| <= ln 2 / 2 and a polynomial of degree 6 (Cody and Waite's reduction; coefficients of
// Cephes expf). Within 2 units in the last place on [-87, 88.7]; 0 below, infinity above; NaN of NaN.
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

// x is bounded where the result is 0 already, so that -infinity gives the limit.
inline F32 silu(F32 x) {
  const F32 bounded = max(fill(-100.0F), x);
  return gate(bounded, bounded);
}

// (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), which loses nothing where tanh is near -1.
inline F32 gelu_tanh(F32 x) {
  const F32 bounded = max(fill(-20.0F), x);
  return gate(bounded, fill(1.595769122F) * fma(fill(0.044715F) * bounded * bounded, bounded, bounded));
}

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
inline F32 erf(F32 x) {
  const F32 size = abs(x);
  const F32 t = fill(1.0F) / fma(size, fill(0.3275911F), fill(1.0F));
  F32 p = fill(1.061405429F);
  p = fma(p, t, fill(-1.453152027F));
  p = fma(p, t, fill(1.421413741F));
  p = fma(p, t, fill(-0.284496736F));
  p = fma(p, t, fill(0.254829592F));
  const F32 y = fill(1.0F) - p * t * exp(zero() - size * size);
  return where_less(x, zero(), zero() - y, y);
}

inline F32 activate(Activation activation, F32 x) {
  switch (activation) {
    case Activation::silu:
      return silu(x);
    case Activation::gelu:
      return fill(0.5F) * x * (fill(1.0F) + erf(x * fill(0.707106781F)));
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

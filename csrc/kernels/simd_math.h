// Elementary functions over the vectors of simd_*.h, which is included before. The same operations on every width:
// a number maps to the same result on each instruction set.
#pragma once

#include "millrace/matmul.h"

namespace millrace {
namespace {

// e^x by range reduction to |r| <= ln 2 / 2 and a polynomial of degree 6 (Cody and Waite's reduction; coefficients of
// Cephes expf). Within 2 units in the last place on [-87, 88]; below -87 it is 0.
inline F32 exp(F32 x) {
  const F32 bounded = min(x, fill(88.0F));
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

inline F32 silu(F32 x) { return x / (fill(1.0F) + exp(zero() - x)); }

}  // namespace
}  // namespace millrace

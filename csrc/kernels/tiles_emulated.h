// The tile instructions in AVX-512, as the manual spells them out (Intel SDM volume 2: LDTILECFG, TILELOADD,
// TDPBF16PS, TDPBSUD), rounding included. tiles_amx.h has the same names. Where a processor would raise #UD this does.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "tile_shapes.h"

namespace millrace {
namespace {
namespace tile {

struct alignas(64) Tile {
  std::uint8_t bytes[kRows][kRowBytes];
};
struct State {
  Shapes shapes;
  Tile tiles[8];
};
inline thread_local State state;

inline __m512i* row(int t, std::int32_t r) { return reinterpret_cast<__m512i*>(state.tiles[t].bytes[r]); }

inline void zero_from(int t, std::int32_t first) {
  for (std::int32_t r = first; r < kRows; ++r) *row(t, r) = _mm512_setzero_si512();
}

inline void configure(const Shapes& shapes) {
  for (int t = 0; t < 8; ++t) {
    if (shapes.palette != 1 || shapes.rows[t] > kRows || shapes.row_bytes[t] > kRowBytes) __builtin_trap();
    zero_from(t, 0);
  }
  state.shapes = shapes;
}

inline void release() {
  for (int t = 0; t < 8; ++t) zero_from(t, 0);
  state.shapes = Shapes{};
}

inline void require_shape(int t) {
  if (state.shapes.rows[t] == 0 || state.shapes.row_bytes[t] == 0) __builtin_trap();
}

inline __mmask64 live_bytes(int t) { return ~0ULL >> (kRowBytes - state.shapes.row_bytes[t]); }

template <int t>
inline void load(const void* from, std::size_t stride) {
  require_shape(t);
  const auto* bytes = static_cast<const std::byte*>(from);
  for (std::int32_t r = 0; r < state.shapes.rows[t]; ++r, bytes += stride) {
    *row(t, r) = _mm512_maskz_loadu_epi8(live_bytes(t), bytes);
  }
  zero_from(t, state.shapes.rows[t]);
}

template <int t>
inline void load_once(const void* from, std::size_t stride) {
  load<t>(from, stride);
}

template <int t>
inline void store(void* to, std::size_t stride) {
  require_shape(t);
  auto* bytes = static_cast<std::byte*>(to);
  for (std::int32_t r = 0; r < state.shapes.rows[t]; ++r, bytes += stride) {
    _mm512_mask_storeu_epi8(bytes, live_bytes(t), *row(t, r));
  }
}

template <int t>
inline void clear() {
  require_shape(t);
  zero_from(t, 0);
}

inline void require_product(int c, int a, int b) {
  const Shapes& s = state.shapes;
  require_shape(c);
  require_shape(a);
  require_shape(b);
  const bool fits = s.rows[c] == s.rows[a] && s.row_bytes[c] == s.row_bytes[b] && s.row_bytes[a] == 4 * s.rows[b] &&
                    s.row_bytes[a] % 4 == 0 && s.row_bytes[b] % 4 == 0;
  if (!fits || c == a || c == b || a == b) __builtin_trap();
}

// Rows [first, first + count) of C.
template <int count>
inline void multiply_int8_rows(int c, int a, int b, std::int32_t first) {
  const Tile& left = state.tiles[a];
  const Tile& right = state.tiles[b];
  Tile& out = state.tiles[c];
  const std::int32_t depth = state.shapes.rows[b];
  __m512i sums[count];
  for (int r = 0; r < count; ++r) sums[r] = _mm512_load_si512(out.bytes[first + r]);
  for (std::int32_t k = 0; k < depth; ++k) {
    const __m512i weights = _mm512_load_si512(right.bytes[k]);
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) {
      const auto* quads = reinterpret_cast<const std::int32_t*>(left.bytes[first + r]);
      sums[r] = _mm512_dpbusd_epi32(sums[r], weights, _mm512_set1_epi32(quads[k]));
    }
  }
  for (int r = 0; r < count; ++r) _mm512_store_si512(out.bytes[first + r], sums[r]);
}

inline void multiply_int8(int c, int a, int b) {
  require_product(c, a, b);
  const std::int32_t rows = state.shapes.rows[a];
  std::int32_t m = 0;
  for (; m + 8 <= rows; m += 8) multiply_int8_rows<8>(c, a, b, m);
  for (; m < rows; ++m) multiply_int8_rows<1>(c, a, b, m);
  zero_from(c, rows);
}

template <int c, int a, int b>
inline void multiply_int8() {
  multiply_int8(c, a, b);
}

// The even and the odd numbers of a row of bf16 as float32.
struct Pairs {
  __m512 even, odd;
};
inline Pairs widen(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)))};
}

// Denormals are zeros, as operands and as results. What is computed between loads from memory and stores to it stays
// between the barriers.
class DenormalsAreZeros {
 public:
  DenormalsAreZeros() : before_(_mm_getcsr()) {
    _mm_setcsr(kFlush);
    asm volatile("" ::: "memory");
  }
  ~DenormalsAreZeros() {
    asm volatile("" ::: "memory");
    _mm_setcsr(before_);
  }
  DenormalsAreZeros(const DenormalsAreZeros&) = delete;
  DenormalsAreZeros& operator=(const DenormalsAreZeros&) = delete;

 private:
  static constexpr unsigned kFlush = 0x9fc0;  // exceptions masked, to nearest even, DAZ, FTZ
  unsigned before_;
};

// Rows [first, first + count) of C: even and odd products are summed apart from zero, k ascending, then added, then
// added to C.
template <int count>
inline void multiply_bf16_rows(int c, int a, std::int32_t depth, const Pairs (&b)[kRows], std::int32_t first) {
  alignas(64) float even[count][kRows];
  alignas(64) float odd[count][kRows];
  Pairs sums[count];
  for (int r = 0; r < count; ++r) {
    const Pairs numbers = widen(*row(a, first + r));
    _mm512_store_ps(even[r], numbers.even);
    _mm512_store_ps(odd[r], numbers.odd);
    sums[r] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  }
  for (std::int32_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
      sums[r].even = _mm512_fmadd_ps(_mm512_set1_ps(even[r][k]), b[k].even, sums[r].even);
      sums[r].odd = _mm512_fmadd_ps(_mm512_set1_ps(odd[r][k]), b[k].odd, sums[r].odd);
    }
  }
  for (int r = 0; r < count; ++r) {
    auto* out = reinterpret_cast<float*>(row(c, first + r));
    _mm512_store_ps(out, _mm512_add_ps(_mm512_load_ps(out), _mm512_add_ps(sums[r].even, sums[r].odd)));
  }
}

inline void multiply_bf16(int c, int a, int b) {
  require_product(c, a, b);
  const DenormalsAreZeros mode;
  const std::int32_t depth = state.shapes.rows[b];
  Pairs numbers[kRows];
  for (std::int32_t k = 0; k < depth; ++k) numbers[k] = widen(*row(b, k));
  const std::int32_t rows = state.shapes.rows[a];
  std::int32_t m = 0;
  for (; m + 4 <= rows; m += 4) multiply_bf16_rows<4>(c, a, depth, numbers, m);
  for (; m < rows; ++m) multiply_bf16_rows<1>(c, a, depth, numbers, m);
  zero_from(c, rows);
}

template <int c, int a, int b>
inline void multiply_bf16() {
  multiply_bf16(c, a, b);
}

}  // namespace tile
}  // namespace
}  // namespace millrace

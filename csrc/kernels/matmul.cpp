#include "millrace/matmul.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "matmul_encode.h"
#include "matmul_kernels.h"
#include "matmul_pack.h"

namespace millrace {
namespace {

template <typename T>
T round_up(T x, std::int32_t step) {
  return (x + static_cast<T>(step) - 1) / static_cast<T>(step) * static_cast<T>(step);
}

std::int32_t padded_k(Width width, std::int32_t k) { return round_up(k, width == Width::bf16 ? 32 : 64); }

[[noreturn]] void needs_avx2() {
  throw std::invalid_argument("matrix products need a processor with AVX2, FMA and F16C (x86-64-v3)");
}

struct Kernels {
  MatmulKernel bf16, int8, int4;
};

Kernels kernels_of(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      break;
    case Isa::avx2:
      return {matmul_bf16_avx2, matmul_int8_avx2, matmul_int4_avx2};
    case Isa::avx512:
      return {matmul_bf16_avx512, matmul_int8_avx512, matmul_int4_avx512};
    case Isa::avx512_bf16:
      return {matmul_bf16_avx512_bf16, matmul_int8_avx512, matmul_int4_avx512};
    case Isa::amx:
      return {matmul_bf16_amx, matmul_int8_amx, matmul_int4_amx};
    case Isa::amx_emulated:
      return {matmul_bf16_amx_emulated, matmul_int8_amx_emulated, matmul_int4_amx_emulated};
  }
  needs_avx2();
}

}  // namespace

void check_shape(Width width, std::int32_t n, std::int32_t k, std::int32_t group) {
  if (n < 1) throw std::invalid_argument("weights must have at least 1 output channel, not " + std::to_string(n));
  if (k < 1 || k > kMaxInputs) {
    throw std::invalid_argument("weights must have 1 to 65536 input channels, not " + std::to_string(k));
  }
  if (width == Width::int4 ? group != 32 && group != 128 : group != 0) {
    throw std::invalid_argument((width == Width::int4 ? "groups of int4 weights must be 32 or 128 long, not "
                                                      : "only int4 weights have groups: group must be 0, not ") +
                                std::to_string(group));
  }
}

std::int32_t blocks(const PackedMatrix& matrix) { return (matrix.n - 1) / kColumns + 1; }

PackedBytes packed_bytes(Width width, std::int32_t n, std::int32_t k, std::int32_t group) {
  const std::size_t columns = round_up(static_cast<std::size_t>(n), kColumns);
  const std::size_t numbers = columns * static_cast<std::size_t>(padded_k(width, k));
  const std::size_t groups = columns * static_cast<std::size_t>(activation_groups(width, k, group));
  switch (width) {
    case Width::bf16:
      return {numbers * sizeof(std::uint16_t), 0, 0};
    case Width::int8:
      return {numbers, columns * sizeof(float), 0};
    case Width::int4:
      return {numbers / 2, groups * sizeof(std::uint16_t), round_up(groups, 64)};
  }
  throw std::invalid_argument("not a width");
}

bool pack_block(const PackedMatrix& matrix, std::int32_t block, const void* const channels[kColumns], Stored stored,
                Isa isa) {
  switch (matrix.width) {
    case Width::bf16:
      return pack_bf16(matrix, block, channels, stored);
    case Width::int8:
      return pack_int8(matrix, block, channels, stored, isa);
    case Width::int4:
      return pack_int4(matrix, block, channels, stored, isa);
  }
  throw std::invalid_argument("not a width");
}

void unpack_channel(const PackedMatrix& matrix, std::int32_t channel, float* out, Isa isa) {
  switch (matrix.width) {
    case Width::bf16:
      return unpack_bf16(matrix, channel, out);
    case Width::int8:
      return unpack_int8(matrix, channel, out, isa);
    case Width::int4:
      return unpack_int4(matrix, channel, out, isa);
  }
}

// An odd number of cache lines: rows a power of two apart would share a few sets of the first cache.
std::size_t activation_row_bytes(Width width, std::int32_t k) {
  const auto numbers = static_cast<std::size_t>(padded_k(width, k));
  const std::size_t lines = (width == Width::bf16 ? numbers * sizeof(std::uint16_t) : numbers) / 64;
  return (lines | 1) * 64;
}

std::int32_t activation_groups(Width width, std::int32_t k, std::int32_t group) {
  if (width == Width::bf16) return 0;
  return width == Width::int8 ? 1 : round_up(padded_k(width, k), group) / group;
}

void encode_row(const Activations& to, std::int32_t row, const float* x, Isa isa) {
  if (isa == Isa::baseline) needs_avx2();
  if (to.width == Width::bf16) return isa == Isa::avx2 ? encode_bf16_avx2(to, row, x) : encode_bf16_avx512(to, row, x);
  return isa == Isa::avx2 ? encode_int_avx2(to, row, x) : encode_int_avx512(to, row, x);
}

void encode_row_bf16(const Activations& to, std::int32_t row, const std::uint16_t* x, Isa isa) {
  if (isa == Isa::baseline) needs_avx2();
  if (to.width == Width::bf16) {
    auto* halves = reinterpret_cast<std::uint16_t*>(to.data + static_cast<std::size_t>(row) * to.row_bytes);
    std::fill(std::copy_n(x, to.k, halves), halves + to.row_bytes / sizeof(std::uint16_t), std::uint16_t{0});
    return;
  }
  return isa == Isa::avx2 ? encode_int_avx2(to, row, x) : encode_int_avx512(to, row, x);
}

void matmul(const PackedMatrix& weights, const Activations& x, const MatmulOutput& output, std::int32_t first_row,
            std::int32_t last_row, std::int32_t first_block, std::int32_t last_block, Isa isa) {
  const Kernels kernels = kernels_of(isa);
  const Ranges ranges{first_row, last_row, first_block, last_block};
  switch (weights.width) {
    case Width::bf16:
      return kernels.bf16(weights, x, output, ranges);
    case Width::int8:
      return kernels.int8(weights, x, output, ranges);
    case Width::int4:
      return kernels.int4(weights, x, output, ranges);
  }
}

}  // namespace millrace

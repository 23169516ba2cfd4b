#include <bit>
#include <memory>
#include <stdexcept>

#include "hadamard.h"
#include "matmul_pack.h"
#include "quantization.h"

namespace millrace {
namespace {

std::int32_t padded_k(const PackedMatrix& matrix) { return (matrix.k + 63) / 64 * 64; }

using Quantize = bool (*)(const PackedMatrix&, std::int32_t, Channels, float*);

bool pack(const PackedMatrix& matrix, std::int32_t block, Channels channels, Isa isa, Quantize avx2, Quantize avx512) {
  if (isa == Isa::baseline) throw std::invalid_argument("packing integers needs a processor with AVX2 (x86-64-v3)");
  const auto scratch = std::make_unique_for_overwrite<float[]>(quantization_scratch(matrix));
  return (isa == Isa::avx2 ? avx2 : avx512)(matrix, block, channels, scratch.get());
}

std::uint8_t byte_at(const PackedMatrix& matrix, std::size_t line, std::int32_t channel, std::int32_t k) {
  return static_cast<std::uint8_t>(matrix.data[line * 64 + static_cast<std::size_t>(channel % 16 * 4 + k % 4)]);
}

// From numbers as products meet them to those of the checkpoint.
void transform_back(float* x, std::int32_t k) {
  for (; k >= kHadamard; k -= kHadamard, x += kHadamard) {
    float values[kHadamard];
    for (std::int32_t i = 0; i < kHadamard; ++i) values[i] = 0.125F * x[i];
    hadamard(values);
    for (std::int32_t i = 0; i < kHadamard; ++i) x[i] = negated(i) ? -values[i] : values[i];
  }
}

}  // namespace

std::size_t quantization_scratch(const PackedMatrix& matrix) {
  constexpr std::size_t kMostLanes = 16;
  const std::int32_t count = matrix.width == Width::int8 ? padded_k(matrix) : kMostInputs;
  return static_cast<std::size_t>(count) * kMostLanes;
}

bool pack_int8(const PackedMatrix& matrix, std::int32_t block, const void* const* channels, Stored stored, Isa isa) {
  return pack(matrix, block, {channels, stored}, isa, quantize_int8_avx2, quantize_int8_avx512);
}

bool pack_int4(const PackedMatrix& matrix, std::int32_t block, const void* const* channels, Stored stored, Isa isa) {
  return pack(matrix, block, {channels, stored}, isa, quantize_int4_avx2, quantize_int4_avx512);
}

void unpack_int8(const PackedMatrix& matrix, std::int32_t channel, float* out, Isa) {
  const auto lines = static_cast<std::size_t>(padded_k(matrix) / 2);
  const std::size_t first = static_cast<std::size_t>(channel / kColumns) * lines;
  const float scale = static_cast<const float*>(matrix.scales)[channel];
  for (std::int32_t k = 0; k < matrix.k; ++k) {
    const std::int32_t line = k / 64 * 32 + channel % kColumns / 16 * 16 + k % 64 / 4;
    out[k] = scale * static_cast<float>(byte_at(matrix, first + static_cast<std::size_t>(line), channel, k) - 128);
  }
  transform_back(out, matrix.k);
}

void unpack_int4(const PackedMatrix& matrix, std::int32_t channel, float* out, Isa) {
  const auto lines = static_cast<std::size_t>(padded_k(matrix) / 4);
  const std::size_t first = static_cast<std::size_t>(channel / kColumns) * lines;
  const auto groups = static_cast<std::size_t>(activation_groups(Width::int4, matrix.k, matrix.group));
  for (std::int32_t k = 0; k < matrix.k; ++k) {
    const std::size_t row =
        static_cast<std::size_t>(channel / kColumns) * groups + static_cast<std::size_t>(k / matrix.group);
    const std::size_t group = row * kColumns + static_cast<std::size_t>(channel % kColumns);
    const std::uint32_t half = static_cast<const std::uint16_t*>(matrix.scales)[group];
    const std::uint8_t both = byte_at(matrix, first + static_cast<std::size_t>(k / 4), channel, k);
    const int code = channel % kColumns < 16 ? both & 15 : both >> 4;
    out[k] = std::bit_cast<float>(half << 16) * static_cast<float>(code - matrix.zeros[group]);
  }
  transform_back(out, matrix.k);
}

}  // namespace millrace

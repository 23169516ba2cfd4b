// Products on tiles against plain loops over the packed layout, bit for bit: the instructions spelled out, and the real
// ones, carried out by a signal handler where the machine has none. And that a missing instruction is survived.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "amx.h"
#include "matmul_kernels.h"
#include "tile_arithmetic.h"
#include "trapped_tiles.h"

namespace {

using millrace::Activation;
using millrace::Epilogue;
using millrace::Isa;
using millrace::kColumns;
using millrace::Width;
using millrace::testing::add;
using millrace::testing::from_bf16;
using millrace::testing::multiply_add;

constexpr float kPoison = -77.5F;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// Starts on a cache line, ends where it ends: the address sanitizer sees what is read behind.
template <typename T>
struct Array {
  explicit Array(std::int64_t n)
      : size(n), data(static_cast<T*>(std::aligned_alloc(64, index((n * bytes + 63) / 64 * 64)))) {}
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T& operator[](std::int64_t i) { return data[i]; }
  const T& operator[](std::int64_t i) const { return data[i]; }
  static constexpr std::int64_t bytes = sizeof(T);
  std::int64_t size;
  T* data;
};

std::int64_t up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

// Random weights and rows in their packed form.
struct Problem {
  Width width;
  std::int32_t n, k, group, rows;
  std::int64_t blocks, steps, groups, row_bytes;
  Array<std::uint8_t> weights;
  Array<std::uint8_t> activations;
  Array<float> channel_scales;        // int8
  Array<std::uint16_t> group_scales;  // int4
  Array<std::uint8_t> zeros;          // int4
  Array<float> scales;
  Array<std::int32_t> sums;
  Array<float> bias;
  std::vector<float> expected;  // [rows][blocks * 32], before bias

  Problem(Width w, std::int32_t channels, std::int32_t inputs, std::int32_t group_size, std::int32_t row_count,
          std::mt19937& random)
      : width(w),
        n(channels),
        k(inputs),
        group(group_size),
        rows(row_count),
        blocks(up(n, 32) / 32),
        steps(up(k, w == Width::bf16 ? 32 : 64) / (w == Width::bf16 ? 32 : 64)),
        groups(w == Width::int4 ? up(steps * 64, group) / group : 1),
        row_bytes((steps | 1) * 64),
        weights(blocks * steps * (w == Width::int4 ? 1024 : 2048)),
        activations(rows * row_bytes),
        channel_scales(blocks * 32),
        group_scales(blocks * groups * 32),
        zeros(blocks * groups * 32),
        scales(rows),
        sums(rows * groups),
        bias(n),
        expected(index(rows * blocks * 32)) {
    std::normal_distribution<float> normal;
    const auto half = [&] {  // now and then so small that products are denormal
      const float x = random() % 8 == 0 ? 1e-20F * normal(random) : normal(random);
      return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16);
    };
    const auto fill = [&](Array<std::uint8_t>& bytes, auto number) {
      for (std::int64_t i = 0; i < bytes.size; i += sizeof number()) {
        const auto x = number();
        std::memcpy(&bytes[i], &x, sizeof x);
      }
    };
    if (width == Width::bf16) {
      fill(weights, half);
      fill(activations, half);
    } else {
      fill(weights, [&] { return static_cast<std::uint8_t>(random()); });
      fill(activations, [&] { return static_cast<std::int8_t>(random() % 255 - 127); });
    }
    for (std::int32_t m = 0; m < rows; ++m) {
      const std::int64_t size = width == Width::bf16 ? 2 : 1;
      std::memset(&activations[m * row_bytes + k * size], 0, index(row_bytes - k * size));
      scales[m] = std::fabs(normal(random));
      for (std::int64_t g = 0; g < groups; ++g) {
        std::int32_t sum = 0;
        const std::int64_t first = g * group;
        const std::int64_t last = width == Width::int4 ? std::min<std::int64_t>(first + group, k) : k;
        for (std::int64_t i = first; i < last; ++i) sum += byte(m, i);
        sums[m * groups + g] = sum;
      }
    }
    for (std::int64_t i = 0; i < blocks * 32; ++i) channel_scales[i] = normal(random);
    for (std::int64_t i = 0; i < group_scales.size; ++i) group_scales[i] = half();
    for (std::int64_t i = 0; i < zeros.size; ++i) zeros[i] = static_cast<std::uint8_t>(random() % 16);
    for (std::int32_t i = 0; i < n; ++i) bias[i] = normal(random);
    for (std::int32_t m = 0; m < rows; ++m) {
      for (std::int64_t c = 0; c < blocks * 32; ++c) expected[index(m * blocks * 32 + c)] = sum(m, c);
    }
  }

  std::int8_t byte(std::int64_t row, std::int64_t i) const {
    return static_cast<std::int8_t>(activations[row * row_bytes + i]);
  }
  std::uint16_t half(const Array<std::uint8_t>& bytes, std::int64_t at) const {
    std::uint16_t bits;
    std::memcpy(&bits, &bytes[at], 2);
    return bits;
  }

  // The product of a row and a channel as millrace/matmul.h defines it.
  float sum(std::int64_t m, std::int64_t channel) const {
    const std::int64_t block = channel / 32;
    const std::int64_t c = channel % 32;
    if (width == Width::bf16) {
      float total = 0;
      for (std::int64_t step = 0; step < steps; ++step) {
        float apart[2] = {0, 0};
        for (std::int64_t i = 0; i < 32; ++i) {
          const std::int64_t tile = ((block * steps + step) * 2 + c / 16) * 1024;
          const float w = from_bf16(half(weights, tile + i / 2 * 64 + c % 16 * 4 + i % 2 * 2));
          const float x = from_bf16(half(activations, m * row_bytes + step * 64 + i * 2));
          apart[i % 2] = multiply_add(x, w, apart[i % 2]);
        }
        total = add(total, add(apart[0], apart[1]));
      }
      return total;
    }
    if (width == Width::int8) {
      std::int32_t total = 0;
      for (std::int64_t i = 0; i < k; ++i) {
        const std::int64_t tile = ((block * steps + i / 64) * 2 + c / 16) * 1024;
        total += byte(m, i) * (weights[tile + i % 64 / 4 * 64 + c % 16 * 4 + i % 4] - 128);
      }
      return scales[m] * (channel_scales[channel] * static_cast<float>(total));
    }
    float total = 0;
    for (std::int64_t g = 0; g < groups; ++g) {
      std::int32_t dot = 0;
      for (std::int64_t i = g * group; i < std::min<std::int64_t>((g + 1) * group, k); ++i) {
        const int both = weights[(block * steps + i / 64) * 1024 + i % 64 / 4 * 64 + c % 16 * 4 + i % 4];
        dot += byte(m, i) * ((c < 16 ? both : both >> 4) & 15);
      }
      const std::int64_t at = (block * groups + g) * 32 + c;
      const float scale = std::bit_cast<float>(std::uint32_t{group_scales[at]} << 16);
      total = std::fmaf(scale, static_cast<float>(dot - zeros[at] * sums[m * groups + g]), total);
    }
    return scales[m] * total;
  }
};

void expect(bool condition, const char* what, const Problem& p, std::int32_t rows, Isa isa) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (width %d, n %d, k %d, group %d, %d rows, isa %d)\n", what,
               static_cast<int>(p.width), p.n, p.k, p.group, rows, static_cast<int>(isa));
  std::exit(1);
}

millrace::MatmulKernel kernel(Width width, Isa isa) {
  const bool real = isa == Isa::amx;
  switch (width) {
    case Width::bf16:
      return real ? millrace::matmul_bf16_amx : millrace::matmul_bf16_amx_emulated;
    case Width::int8:
      return real ? millrace::matmul_int8_amx : millrace::matmul_int8_amx_emulated;
    case Width::int4:
      return real ? millrace::matmul_int4_amx : millrace::matmul_int4_amx_emulated;
  }
  std::abort();
}

std::uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// The numbers of `ranges` become what they should, the others stay what they were.
void check(const Problem& p, millrace::Ranges ranges, Epilogue epilogue, bool with_bias, Isa isa) {
  const bool halves = epilogue == Epilogue::activate || epilogue == Epilogue::gate;
  const std::int64_t columns = epilogue == Epilogue::gate ? p.n / 2 : p.n;
  const std::int64_t stride = columns + 3;
  const std::int64_t size = (p.rows - 1) * stride + columns;
  std::vector<float> out(halves ? 0 : index(size), kPoison);
  std::vector<std::uint16_t> half(halves ? index(size) : 0, to_bf16(kPoison));
  const millrace::PackedMatrix weights{
      p.width,
      p.n,
      p.k,
      p.group,
      reinterpret_cast<std::byte*>(p.weights.data),
      p.width == Width::int4 ? static_cast<void*>(p.group_scales.data) : static_cast<void*>(p.channel_scales.data),
      p.zeros.data};
  const millrace::Activations x{
      p.width,       p.group,    p.rows, p.k, reinterpret_cast<std::byte*>(p.activations.data), index(p.row_bytes),
      p.scales.data, p.sums.data};
  kernel(p.width, isa)(weights, x,
                       {epilogue, Activation::relu, with_bias ? p.bias.data : nullptr, out.data(), half.data(), stride},
                       ranges);
  const std::int32_t rows = ranges.last_row - ranges.first_row;
  for (std::int64_t m = 0; m < p.rows; ++m) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t channel = epilogue == Epilogue::gate ? c / 16 * 32 + c % 16 : c;
      const auto sum = [&](std::int64_t i) {
        return p.expected[index(m * p.blocks * 32 + i)] + (with_bias ? p.bias[i] : 0.0F);
      };
      const bool inside = m >= ranges.first_row && m < ranges.last_row && channel / 32 >= ranges.first_block &&
                          channel / 32 < ranges.last_block;
      float expected = kPoison;
      if (inside) {
        expected = sum(channel);
        if (epilogue == Epilogue::add) expected = kPoison + expected;
        if (halves) expected = std::max(expected, 0.0F);
        if (epilogue == Epilogue::gate) expected *= sum(channel + 16);
      }
      const std::int64_t at = m * stride + c;
      const bool equal =
          halves ? from_bf16(half[index(at)]) == from_bf16(to_bf16(expected)) : out[index(at)] == expected;
      expect(equal, inside ? "a product" : "nothing else is written", p, rows, isa);
    }
  }
}

struct Shape {
  std::int32_t n, k;
};

void check_all(const std::vector<Shape>& shapes, const std::vector<std::int32_t>& row_counts, Isa isa,
               std::mt19937& random) {
  const std::int32_t most = *std::max_element(row_counts.begin(), row_counts.end());
  for (const auto& [width, group] :
       {std::pair{Width::bf16, 0}, {Width::int8, 0}, {Width::int4, 128}, {Width::int4, 32}}) {
    for (const Shape shape : shapes) {
      const Problem p(width, shape.n, shape.k, group, most, random);
      const auto blocks = static_cast<std::int32_t>(p.blocks);
      for (const std::int32_t rows : row_counts) check(p, {0, rows, 0, blocks}, Epilogue::store, false, isa);
      const Epilogue gate = p.n % 32 == 0 ? Epilogue::gate : Epilogue::activate;
      for (const Epilogue epilogue : {Epilogue::store, Epilogue::add, Epilogue::activate, gate}) {
        check(p, {most / 3, most - most / 4, blocks / 3, blocks - blocks / 4}, epilogue, true, isa);
      }
      check(p, {0, most, 0, blocks}, Epilogue::add, true, isa);
      check(p, {most - 1, most, 0, blocks}, Epilogue::add, true, isa);
      check(p, {0, 0, 0, blocks}, Epilogue::add, true, isa);
      check(p, {0, most, 0, 0}, Epilogue::add, true, isa);
    }
  }
}

bool meets_an_illegal_instruction() {
  asm volatile("ud2");
  return true;
}

void check_guard(const Problem& p) {
  for (int again = 0; again < 3; ++again) {
    expect(!millrace::survives(meets_an_illegal_instruction), "an illegal instruction is survived", p, 0, Isa::amx);
    expect(millrace::survives([] { return true; }), "what works is true", p, 0, Isa::amx);
    expect(!millrace::survives([] { return false; }), "what is wrong is false", p, 0, Isa::amx);
  }
  const bool amx = millrace::has_amx();
  const auto found = millrace::available_isas();
  expect(amx == (std::find(found.begin(), found.end(), Isa::amx) != found.end()), "amx if usable", p, 0, Isa::amx);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  check_guard(Problem(Width::bf16, 1, 1, 0, 1, random));
  if (!__builtin_cpu_supports("avx512bf16")) return 0;  // emulated with it

  std::vector<std::int32_t> rows;
  for (std::int32_t m = 1; m <= 40; ++m) rows.push_back(m);
  check_all({{1, 1}, {33, 31}, {64, 129}, {160, 1100}}, rows, Isa::amx_emulated, random);
  check_all({{96, 65}, {160, 577}}, {64, 129, 513, 530}, Isa::amx_emulated, random);

  const bool real = millrace::has_amx();
  if (!real) {
    millrace::testing::trap_tiles();
    expect(millrace::tiles_multiply(), "the self-test", Problem(Width::bf16, 1, 1, 0, 1, random), 0, Isa::amx);
  }
  check_all({{7, 33}, {96, 129}, {64, 1100}}, {1, 15, 16, 17, 33, 40, 65}, Isa::amx, random);
  if (!real && millrace::testing::trapped_tiles() == 0) return 1;
}

// The face is kernels/matmul.py.
#include "millrace/matmul.h"

#include <pybind11/stl.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "arrays.h"
#include "bindings.h"
#include "names.h"
#include "runtime/arena.h"

namespace millrace::bindings {
namespace {

constexpr Word<Epilogue> kEpilogues[] = {
    {"store", Epilogue::store}, {"add", Epilogue::add}, {"activate", Epilogue::activate}, {"gate", Epilogue::gate}};
constexpr std::align_val_t kLine{64};
struct Free {
  void operator()(std::byte* p) const { ::operator delete[](p, kLine); }
};
using Scratch = std::unique_ptr<std::byte[], Free>;

Scratch scratch(std::size_t bytes) { return Scratch(new (kLine) std::byte[bytes]); }

struct Matrix {
  const std::byte* data;
  std::int32_t rows, columns;
  std::int64_t row_bytes;
};

// [rows, columns] with contiguous rows, any distance apart.
Matrix matrix(const py::array& array, const char* name) {
  const std::string is = std::string(name) + " must ";
  constexpr py::ssize_t kMost = std::numeric_limits<std::int32_t>::max();
  if (array.ndim() != 2 || array.shape(0) > kMost || array.shape(1) > kMost)
    fail(is + "have two dimensions below 2^31");
  const py::ssize_t size = array.itemsize();
  const bool contiguous = array.size() == 0 || array.shape(1) == 1 || array.strides(1) == size;
  if (!contiguous || array.strides(0) % size != 0 ||
      reinterpret_cast<std::uintptr_t>(array.data()) % static_cast<std::uintptr_t>(size) != 0) {
    fail(is + "have contiguous, aligned rows");
  }
  return {static_cast<const std::byte*>(array.data()), static_cast<std::int32_t>(array.shape(0)),
          static_cast<std::int32_t>(array.shape(1)), array.strides(0)};
}

Stored stored_of(const py::array& array, const char* name) {
  const py::dtype type = array.dtype();
  if (type.equal(py::dtype::of<float>())) return Stored::float32;
  if (type.equal(py::dtype("float16"))) return Stored::float16;
  if (type.equal(py::dtype::of<std::uint16_t>())) return Stored::bfloat16;
  fail(std::string(name) + " must be float32, float16 or uint16 (the bits of bfloat16), not " +
       std::string(py::str(type)));
}

class PackedWeights {
 public:
  PackedWeights(Width width, std::int32_t n, std::int32_t k, std::int32_t group)
      : bytes_((check_shape(width, n, k, group), packed_bytes(width, n, k, group))),
        arena_(bytes_.data + bytes_.scales + bytes_.zeros),
        matrix_{width, n, k, group, arena_.array<std::byte>(bytes_.data), nullptr, nullptr} {
    if (bytes_.scales > 0) matrix_.scales = arena_.allocate(bytes_.scales);
    if (bytes_.zeros > 0) matrix_.zeros = arena_.array<std::uint8_t>(bytes_.zeros);
  }

  const PackedMatrix& get() const { return matrix_; }

  void pack(const Matrix& from, Stored stored, Isa isa) {
    for (std::int32_t block = 0; block < blocks(matrix_); ++block) {
      const std::int32_t first = block * kColumns;
      const void* channels[kColumns] = {};
      for (std::int32_t c = 0; c < kColumns && first + c < matrix_.n; ++c) {
        channels[c] = from.data + (first + c) * from.row_bytes;
      }
      if (!pack_block(matrix_, block, channels, stored, isa)) {
        throw std::invalid_argument("weight[" + std::to_string(first) + ":" + std::to_string(first + kColumns) +
                                    "] holds NaN, infinity or a number too large for its width");
      }
    }
  }

  py::array_t<float> unpack() const {
    py::array_t<float> out({matrix_.n, matrix_.k});
    const Isa isa = current_isa();
    for (std::int32_t n = 0; n < matrix_.n; ++n) unpack_channel(matrix_, n, out.mutable_data(n, 0), isa);
    return out;
  }

  py::array_t<float> scales() const {
    const std::int32_t groups = activation_groups(matrix_.width, matrix_.k, matrix_.group);
    py::array_t<float> out({matrix_.n, groups});
    for (std::int32_t n = 0; n < matrix_.n; ++n) {
      for (std::int32_t g = 0; g < groups; ++g) {
        const auto at = static_cast<std::size_t>((n / kColumns * groups + g) * kColumns + n % kColumns);
        const auto half = [&] {
          return static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(matrix_.scales)[at]);
        };
        out.mutable_at(n, g) = matrix_.width == Width::int8 ? static_cast<const float*>(matrix_.scales)[at]
                                                            : std::bit_cast<float>(half() << 16);
      }
    }
    return out;
  }

 private:
  PackedBytes bytes_;
  Arena arena_;
  PackedMatrix matrix_;
};

std::unique_ptr<PackedWeights> pack(const py::array& weight, const std::string& width, std::int32_t group) {
  const Matrix from = matrix(weight, "weight");
  const Stored stored = stored_of(weight, "weight");
  const Isa isa = current_isa();
  auto packed = std::make_unique<PackedWeights>(meaning(kWidths, "width", width), from.rows, from.columns, group);
  const py::gil_scoped_release release;
  packed->pack(from, stored, isa);
  return packed;
}

using Range = std::optional<std::pair<std::int32_t, std::int32_t>>;

std::pair<std::int32_t, std::int32_t> within(const Range& range, std::int32_t end, const char* name) {
  const auto [first, last] = range.value_or(std::pair{0, end});
  if (first < 0 || first > last || last > end) {
    fail(std::string(name) + " must be a range within (0, " + std::to_string(end) + ")");
  }
  return {first, last};
}

MatmulOutput output_of(py::array& out, Epilogue epilogue, Activation activation, const float* bias,
                       const PackedMatrix& weights, std::int32_t rows) {
  const bool half = epilogue == Epilogue::activate || epilogue == Epilogue::gate;
  if (!out.dtype().equal(half ? py::dtype::of<std::uint16_t>() : py::dtype::of<float>())) {
    fail(std::string("out must be ") + (half ? "uint16 (the bits of bfloat16)" : "float32"));
  }
  if (epilogue == Epilogue::gate && weights.n % kColumns != 0) {
    fail("the output channels of gate must be a multiple of 32: 16 gates and 16 ups, in turn");
  }
  const std::int32_t columns = epilogue == Epilogue::gate ? weights.n / 2 : weights.n;
  const Matrix to = matrix(out, "out");
  if (to.rows != rows || to.columns != columns) {
    fail("out must have the shape (" + std::to_string(rows) + ", " + std::to_string(columns) + ")");
  }
  void* data = out.mutable_data();
  return {epilogue,
          activation,
          bias,
          half ? nullptr : static_cast<float*>(data),
          half ? static_cast<std::uint16_t*>(data) : nullptr,
          to.row_bytes / out.itemsize()};
}

void multiply(const py::array& x, const PackedWeights& packed, const std::optional<py::array>& bias,
              const std::string& epilogue, const std::string& activation, py::array& out, const Range& row_range,
              const Range& block_range) {
  const PackedMatrix& weights = packed.get();
  const Matrix from = matrix(x, "x");
  const Stored stored = stored_of(x, "x");
  if (stored == Stored::float16) fail("x must be float32 or uint16 (the bits of bfloat16), not float16");
  if (from.columns != weights.k) {
    fail("x must have " + std::to_string(weights.k) + " columns, not " + std::to_string(from.columns));
  }
  const float* biases = bias ? column<float>(*bias, "bias", weights.n) : nullptr;
  const MatmulOutput output = output_of(out, meaning(kEpilogues, "epilogue", epilogue),
                                        meaning(kActivations, "activation", activation), biases, weights, from.rows);
  const auto [first_row, last_row] = within(row_range, from.rows, "rows");
  const auto [first_block, last_block] = within(block_range, blocks(weights), "blocks");
  const Isa isa = current_isa();

  const py::gil_scoped_release release;
  const auto rows = static_cast<std::size_t>(from.rows);
  const auto groups = static_cast<std::size_t>(activation_groups(weights.width, weights.k, weights.group));
  const std::size_t row_bytes = activation_row_bytes(weights.width, weights.k);
  const Scratch data = scratch(rows * row_bytes);
  const Scratch scales = scratch(rows * sizeof(float));
  const Scratch sums = scratch(rows * groups * sizeof(std::int32_t));
  const Activations encoded{weights.width,
                            weights.group,
                            from.rows,
                            weights.k,
                            data.get(),
                            row_bytes,
                            reinterpret_cast<float*>(scales.get()),
                            reinterpret_cast<std::int32_t*>(sums.get())};
  for (std::int32_t row = first_row; row < last_row; ++row) {
    const std::byte* numbers = from.data + row * from.row_bytes;
    if (stored == Stored::float32) {
      encode_row(encoded, row, reinterpret_cast<const float*>(numbers), isa);
    } else {
      encode_row_bf16(encoded, row, reinterpret_cast<const std::uint16_t*>(numbers), isa);
    }
  }
  matmul(weights, encoded, output, first_row, last_row, first_block, last_block, isa);
}

}  // namespace

void bind_matmul(py::module_& module) {
  py::class_<PackedWeights>(module, "PackedWeights", "See millrace.kernels.matmul.pack.")
      .def(py::init(&pack), py::arg("weight"), py::arg("width"), py::arg("group"))
      .def("unpack", &PackedWeights::unpack, "The weights as the checkpoint would hold them: float32 [n, k].")
      .def_property_readonly("scales", &PackedWeights::scales, "float32 [n, groups]; int8 has one group, bf16 none.")
      .def_property_readonly("shape", [](const PackedWeights& self) { return std::pair(self.get().n, self.get().k); })
      .def_property_readonly("blocks", [](const PackedWeights& self) { return blocks(self.get()); });
  module.def("matmul", &multiply, py::kw_only(), py::arg("x"), py::arg("weights"), py::arg("bias"), py::arg("epilogue"),
             py::arg("activation"), py::arg("out").noconvert(), py::arg("rows"), py::arg("blocks"),
             "See millrace.kernels.matmul.matmul.");
}

}  // namespace millrace::bindings

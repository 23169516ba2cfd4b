// The face is kernels/rows.py.
#include "millrace/rows.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "arrays.h"
#include "bindings.h"
#include "names.h"

namespace millrace::bindings {
namespace {

constexpr Word<Stored> kStored[] = {
    {"float32", Stored::float32}, {"float16", Stored::float16}, {"bfloat16", Stored::bfloat16}};

Rows<float> floats(const py::array& array, const char* name) { return rows_of<float>(array, name, false); }
Rows<float> result(const py::array& array, const char* name, std::int32_t rows, std::int32_t size) {
  const Rows<float> out = rows_of<float>(array, name, true);
  if (out.rows != rows || out.size != size) {
    fail(std::string(name) + " must be [" + std::to_string(rows) + ", " + std::to_string(size) + "]");
  }
  return out;
}

float positive(float eps) {
  if (!(eps > 0.0F)) fail("eps must be above 0");
  return eps;
}

// Calls body(row) for each, without the GIL.
template <typename Body>
void each_row(std::int32_t rows, Body body) {
  const py::gil_scoped_release release;
  for (std::int32_t row = 0; row < rows; ++row) body(row);
}

void rms_norm(const py::array& x, const py::array& weight, float eps, const py::array& out) {
  const Rows<float> in = floats(x, "x"), to = result(out, "out", in.rows, in.size);
  const auto* w = column<float>(weight, "weight", in.size);
  each_row(in.rows, [&, e = positive(eps), isa = current_isa()](std::int32_t row) {
    millrace::rms_norm(in.row(row), w, e, in.size, to.row(row), isa);
  });
}

void layer_norm(const py::array& x, const py::array& weight, const py::array& bias, float eps, const py::array& out) {
  const Rows<float> in = floats(x, "x"), to = result(out, "out", in.rows, in.size);
  const auto* w = column<float>(weight, "weight", in.size);
  const auto* b = column<float>(bias, "bias", in.size);
  each_row(in.rows, [&, e = positive(eps), isa = current_isa()](std::int32_t row) {
    millrace::layer_norm(in.row(row), w, b, e, in.size, to.row(row), isa);
  });
}

void rotary_turns(const py::array& positions, const py::array& frequencies, float factor, const py::array& cosine,
                  const py::array& sine) {
  const auto* at = checked<std::int32_t>(positions, "positions", -1, "[0, 2^24]",
                                         [](std::int32_t v) { return v >= 0 && v <= 1 << 24; });
  const auto* radians =
      checked<float>(frequencies, "frequencies", -1, "[0, 1]", [](float v) { return v >= 0.0F && v <= 1.0F; });
  const auto rows = static_cast<std::int32_t>(positions.shape(0));
  const auto half = static_cast<std::int32_t>(frequencies.shape(0));
  const Rows<float> c = result(cosine, "cosine", rows, half), s = result(sine, "sine", rows, half);
  each_row(rows,
           [&](std::int32_t row) { millrace::rotary_turns(at[row], radians, factor, half, c.row(row), s.row(row)); });
}

void rotate(const py::array& x, std::int32_t dim, const py::array& cosine, const py::array& sine) {
  const Rows<float> c = floats(cosine, "cosine"), s = floats(sine, "sine"), in = rows_of<float>(x, "x", true);
  if (dim != 2 * std::int64_t{c.size} || in.size % dim != 0 || in.rows != c.rows || c.rows != s.rows ||
      c.size != s.size) {
    fail("x must be [rows, heads * dim], cosine and sine [rows, dim / 2]");
  }
  each_row(in.rows, [&, isa = current_isa()](std::int32_t row) {
    millrace::rotate(in.row(row), in.size / dim, dim, c.row(row), s.row(row), isa);
  });
}

void embed_rows(const py::array& table, const std::string& stored, const py::array& ids, bool accumulate,
                const py::array& out) {
  const Stored kind = meaning(kStored, "stored", stored);
  const bool single = kind == Stored::float32;
  const std::int32_t count = single ? floats(table, "table").rows : rows_of<std::uint16_t>(table, "table", false).rows;
  const auto size = static_cast<std::int32_t>(table.shape(1));
  const auto* id =
      checked<std::int32_t>(ids, "ids", -1, "[0, rows of table)", [&](std::int32_t v) { return v >= 0 && v < count; });
  const auto* bytes = static_cast<const std::byte*>(table.data());
  const std::int64_t row_bytes = std::int64_t{size} * (single ? 4 : 2);
  const Rows<float> to = result(out, "out", static_cast<std::int32_t>(ids.shape(0)), size);
  each_row(to.rows, [&, isa = current_isa()](std::int32_t row) {
    millrace::embed_row(bytes + id[row] * row_bytes, kind, size, accumulate, to.row(row), isa);
  });
}

void add_rows(const py::array& x, const py::array& out) {
  const Rows<float> in = floats(x, "x"), to = result(out, "out", in.rows, in.size);
  each_row(in.rows,
           [&, isa = current_isa()](std::int32_t row) { millrace::add_row(in.row(row), in.size, to.row(row), isa); });
}

void mean_rows(const py::array& x, const py::array& out) {
  const Rows<float> in = floats(x, "x"), to = result(out, "out", 1, in.size);
  if (in.rows < 1) fail("x must have a row: there is no mean of none");
  each_row(1, [&, isa = current_isa()](std::int32_t) {
    millrace::mean_rows(in.data, in.size, in.rows, in.size, to.data, isa);
  });
}

void normalize(const py::array& x) {
  const Rows<float> in = rows_of<float>(x, "x", true);
  each_row(in.rows, [&, isa = current_isa()](std::int32_t row) { millrace::normalize(in.row(row), in.size, isa); });
}

void activate(const py::array& x, const std::string& kind, const py::array& out) {
  const Rows<float> in = floats(x, "x"), to = result(out, "out", in.rows, in.size);
  each_row(in.rows, [&, activation = meaning(kActivations, "kind", kind), isa = current_isa()](std::int32_t row) {
    millrace::activate_row(activation, in.row(row), in.size, to.row(row), isa);
  });
}

void exp(const py::array& x, const py::array& out) {
  const Rows<float> in = floats(x, "x"), to = result(out, "out", in.rows, in.size);
  each_row(in.rows,
           [&, isa = current_isa()](std::int32_t row) { millrace::exp_row(in.row(row), in.size, to.row(row), isa); });
}

}  // namespace

void bind_rows(py::module_& module) {
  module.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"));
  module.def("layer_norm", &layer_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
             py::arg("out"));
  module.def("rotary_turns", &rotary_turns, py::arg("positions"), py::arg("frequencies"), py::arg("factor"),
             py::arg("cosine"), py::arg("sine"));
  module.def("rotate", &rotate, py::arg("x"), py::arg("dim"), py::arg("cosine"), py::arg("sine"));
  module.def("embed_rows", &embed_rows, py::arg("table"), py::arg("stored"), py::arg("ids"), py::arg("accumulate"),
             py::arg("out"));
  module.def("add_rows", &add_rows, py::arg("x"), py::arg("out"));
  module.def("mean_rows", &mean_rows, py::arg("x"), py::arg("out"));
  module.def("normalize", &normalize, py::arg("x"));
  module.def("activate", &activate, py::arg("x"), py::arg("kind"), py::arg("out"));
  module.def("exp", &exp, py::arg("x"), py::arg("out"));
}

}  // namespace millrace::bindings

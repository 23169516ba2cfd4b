// The face is server/model/executors/cpu_weights.py.
#include "runtime/weights.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "names.h"
#include "runtime/network.h"

namespace millrace::bindings {
namespace {

using Int32 = std::int32_t;

constexpr Word<Stored> kStored[] = {{"F32", Stored::float32}, {"F16", Stored::float16}, {"BF16", Stored::bfloat16}};
constexpr Word<Pooling> kPoolings[] = {{"last", Pooling::last}, {"mean", Pooling::mean}, {"cls", Pooling::first}};

Width width_of(const std::string& text) { return meaning(kWidths, "width", text); }

// What Weights hands out, for Python to hold: values into memory that lives as long as the model.
struct Vector {
  const float* data;
};
struct Matrix {
  PackedMatrix packed;
};

// (bytes, dtype, rows, columns)
using Source = std::tuple<py::buffer, std::string, Int32, Int32>;

std::vector<Tensor> tensors_of(const std::vector<Source>& sources, std::vector<py::buffer_info>& views) {
  std::vector<Tensor> tensors;
  for (const auto& [buffer, dtype, rows, columns] : sources) {
    views.push_back(buffer.request());
    const Stored stored = meaning(kStored, "dtype", dtype);
    const auto expected = static_cast<py::ssize_t>(stored_bytes(stored)) * rows * columns;
    if (views.back().size * views.back().itemsize != expected) {
      fail("a tensor of " + std::to_string(rows) + " x " + std::to_string(columns) + " " + dtype + " takes " +
           std::to_string(expected) + " bytes");
    }
    tensors.push_back({static_cast<const std::byte*>(views.back().ptr), stored, rows, columns});
  }
  return tensors;
}

// Packs on the pool without the GIL; a number that is not finite is a ValueError that the caller gives a name.
template <typename Pack>
auto pack(const std::vector<Source>& sources, Pack&& pack_tensors) {
  std::vector<py::buffer_info> views;
  const std::vector<Tensor> tensors = tensors_of(sources, views);
  const py::gil_scoped_release release;
  return pack_tensors(tensors);
}

void bind_tensors(py::module_& module) {
  py::class_<Pool, std::shared_ptr<Pool>>(module, "Pool", "The threads that compute steps, one step at a time.")
      .def(py::init<int, int>(), py::arg("threads"), py::arg("first_core") = 0)
      .def_property_readonly("size", &Pool::size);
  py::class_<Vector>(module, "Vector");
  py::class_<Matrix>(module, "Matrix");
  py::class_<Table>(module, "Table").def(py::init<>());
  py::class_<Weights>(module, "Weights", "Memory of packed tensors.")
      .def(py::init([](std::size_t bytes, Pool& pool) { return Weights(bytes, pool, current_isa()); }),
           py::arg("bytes"), py::arg("pool"), py::keep_alive<1, 3>())
      .def_static(
          "packed",
          [](const std::string& width, Int32 group, Int32 n, Int32 k) {
            check_shape(width_of(width), n, k, group);
            return Weights::packed({width_of(width), group}, n, k);
          },
          py::arg("width"), py::arg("group"), py::arg("n"), py::arg("k"), "Bytes of a packed matrix [n, k].")
      .def(
          "pack",
          [](Weights& self, const std::vector<Source>& sources, bool interleaved, const std::string& width,
             Int32 group) {
            const Order order = interleaved ? Order::interleaved : Order::joined;
            return pack(sources, [&](const std::vector<Tensor>& tensors) {
              return Matrix{self.pack(tensors, order, {width_of(width), group})};
            });
          },
          py::arg("sources"), py::arg("interleaved"), py::arg("width"), py::arg("group"))
      .def(
          "vector",
          [](Weights& self, const std::vector<Source>& sources, bool interleaved) {
            const Order order = interleaved ? Order::interleaved : Order::joined;
            return pack(sources,
                        [&](const std::vector<Tensor>& tensors) { return Vector{self.vector(tensors, order)}; });
          },
          py::arg("sources"), py::arg("interleaved") = false)
      .def("table", [](Weights& self, const Source& source) {
        return pack({source}, [&](const std::vector<Tensor>& tensors) { return self.table(tensors[0]); });
      });
}

void bind_network(py::module_& module) {
  py::class_<Norm>(module, "Norm")
      .def(py::init<>())
      .def(py::init([](bool layer, float eps, const Vector& weight, const Vector* bias) {
             return Norm{layer, eps, weight.data, bias == nullptr ? nullptr : bias->data};
           }),
           py::arg("layer"), py::arg("eps"), py::arg("weight"), py::arg("bias"));
  py::class_<Linear>(module, "Linear")
      .def(py::init([](const Matrix& weight, const Vector* bias) {
             return Linear{weight.packed, bias == nullptr ? nullptr : bias->data};
           }),
           py::arg("weight"), py::arg("bias"));
  py::class_<Rotary>(module, "Rotary")
      .def(py::init([](Int32 dim, float factor, const Vector& frequencies) {
             return Rotary{dim, factor, frequencies.data};
           }),
           py::arg("dim"), py::arg("factor"), py::arg("frequencies"));
  py::class_<Layer>(module, "Layer")
      .def(py::init<>())
      .def_readwrite("post_norm", &Layer::post_norm)
      .def_readwrite("attention_norm", &Layer::attention_norm)
      .def_readwrite("mlp_norm", &Layer::mlp_norm)
      .def_readwrite("q_norm", &Layer::q_norm)
      .def_readwrite("k_norm", &Layer::k_norm)
      .def_readwrite("heads", &Layer::heads)
      .def_readwrite("kv_heads", &Layer::kv_heads)
      .def_readwrite("head_dim", &Layer::head_dim)
      .def_readwrite("scale", &Layer::scale)
      .def_readwrite("rotary", &Layer::rotary)
      .def_readwrite("causal", &Layer::causal)
      .def_readwrite("window", &Layer::window)
      .def_readwrite("qkv", &Layer::qkv)
      .def_readwrite("o", &Layer::o)
      .def_readwrite("gated", &Layer::gated)
      .def_property(
          "activation", [](const Layer& layer) { return static_cast<int>(layer.activation); },
          [](Layer& layer, const std::string& text) { layer.activation = meaning(kActivations, "activation", text); })
      .def_readwrite("mlp_size", &Layer::mlp_size)
      .def_readwrite("up", &Layer::up)
      .def_readwrite("down", &Layer::down);
  py::class_<Network>(module, "Network")
      .def(py::init<>())
      .def_readwrite("vocab", &Network::vocab)
      .def_readwrite("hidden", &Network::hidden)
      .def_readwrite("embedding", &Network::embedding)
      .def_readwrite("positions", &Network::positions)
      .def_readwrite("position_offset", &Network::position_offset)
      .def_readwrite("token_types", &Network::token_types)
      .def_readwrite("embedding_norm", &Network::embedding_norm)
      .def_readwrite("final_norm", &Network::final_norm)
      .def_readwrite("rotaries", &Network::rotaries)
      .def_readwrite("layers", &Network::layers)
      .def_property(
          "head", [](const Network& network) { return Matrix{network.head}; },
          [](Network& network, const Matrix& matrix) { network.head = matrix.packed; })
      .def_property(
          "pooling", [](const Network& network) { return static_cast<int>(network.pooling); },
          [](Network& network, const std::string& text) { network.pooling = meaning(kPoolings, "pooling", text); })
      .def_readwrite("normalize", &Network::normalize);
}

}  // namespace

void bind_weights(py::module_& module) {
  bind_tensors(module);
  bind_network(module);
}

}  // namespace millrace::bindings

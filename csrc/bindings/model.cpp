// The face is server/model/executors/cpu.py.
#include "runtime/model.h"

#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "names.h"
#include "runtime/cores.h"
#include "sampling.h"

namespace millrace::bindings {
namespace {

using Int32 = std::int32_t;

KVType kv_type_of(const std::string& text) { return meaning(kKVTypes, "kv_type", text); }

// The part of a batch that a step reads, checked: nothing outside the cache or the tables is touched.
struct Checked {
  StepInput input{};
  Checked(Model& model, const py::array& token_ids, const py::array& positions, const py::array& slots,
          const py::array& starts, const py::array& context_lens, const py::array& block_tables,
          const py::array& draw_tokens, const py::array& pooled_rows,
          const std::pair<py::array, py::array>& embeddings) {
    const Network& network = model.network();
    const py::ssize_t tokens = token_ids.shape(0), rows = context_lens.shape(0);
    if (rows < 1 || tokens < rows) fail("a step has at least one row, and each at least one token");
    const auto below = [](std::int64_t end) { return [end](Int32 v) { return v >= 0 && v < end; }; };
    input.rows = static_cast<Int32>(rows);
    input.tokens = static_cast<Int32>(tokens);
    set_embeddings(embeddings.first, embeddings.second, network.hidden);
    input.token_ids = checked<Int32>(token_ids, "token_ids", tokens, "[-1, vocabulary)",
                                     [&](Int32 v) { return v >= -1 && v < network.vocab; });
    check_given();
    const std::int64_t most = network.positions.data == nullptr ? std::numeric_limits<Int32>::max()
                                                                : network.positions.rows - network.position_offset;
    input.positions = checked<Int32>(positions, "positions", tokens, "the positions of the model", below(most));
    input.offsets = offsets(starts, "offsets", rows, tokens);
    input.context_lens = checked<Int32>(context_lens, "context_lens", rows, "[1, 2^31)", [](Int32 v) { return v > 0; });
    for (py::ssize_t row = 0; row < rows; ++row) {
      const Int32 length = input.offsets[row + 1] - input.offsets[row];
      if (length < 1) fail("row " + std::to_string(row) + " has no tokens");
      const Int32 last = input.positions[input.offsets[row + 1] - 1];
      if (last + 1 != input.context_lens[row] || last - input.positions[input.offsets[row]] != length - 1) {
        fail("row " + std::to_string(row) + " does not end at its context length");
      }
    }
    if (network.causal()) check_blocks(model, slots, block_tables);
    input.draws = static_cast<Int32>(draw_tokens.shape(0));
    if (input.draws > 0 && network.head.data == nullptr) fail("an encoder has no logits");
    input.draw_tokens = checked<Int32>(draw_tokens, "draw_tokens", -1, "[0, tokens)", below(tokens));
    input.pooled = static_cast<Int32>(pooled_rows.shape(0));
    input.pooled_rows = checked<Int32>(pooled_rows, "pooled_rows", -1, "[0, rows)", below(rows));
    for (Int32 i = 1; i < input.pooled; ++i) {
      if (input.pooled_rows[i] <= input.pooled_rows[i - 1]) fail("pooled_rows must rise");
    }
  }

 private:
  void set_embeddings(const py::array& indices, const py::array& vectors, Int32 hidden) {
    input.embedded = static_cast<Int32>(indices.shape(0));
    input.embedded_tokens = checked<Int32>(indices, "embedding indices", -1, "[0, tokens)",
                                           [&](Int32 v) { return v >= 0 && v < input.tokens; });
    if (!vectors.dtype().equal(py::dtype::of<float>()) || vectors.ndim() != 2 || vectors.shape(0) != input.embedded ||
        (input.embedded > 0 && vectors.shape(1) != hidden) || (vectors.flags() & py::array::c_style) == 0) {
      fail("embeddings must be contiguous float32 [embeddings, hidden]");
    }
    input.embeddings = static_cast<const float*>(vectors.data());
  }

  // -1 stands only where an embedding comes.
  void check_given() const {
    const std::set<Int32> given(input.embedded_tokens, input.embedded_tokens + input.embedded);
    for (Int32 token = 0; token < input.tokens; ++token) {
      if (input.token_ids[token] < 0 && given.count(token) == 0) {
        fail("token_ids[" + std::to_string(token) + "] = -1, and no embedding comes for it");
      }
    }
  }

  void check_blocks(Model& model, const py::array& slots, const py::array& block_tables) {
    const std::int64_t blocks = model.kv().blocks();
    input.slots = checked<Int32>(slots, "slots", input.tokens, "the cache",
                                 [&](Int32 v) { return v >= 0 && v < blocks * kBlockTokens; });
    if (!block_tables.dtype().equal(py::dtype::of<Int32>()) || block_tables.ndim() != 2 ||
        block_tables.shape(0) != input.rows || (block_tables.flags() & py::array::c_style) == 0) {
      fail("block_tables must be contiguous int32 [rows, blocks]");
    }
    input.block_tables = static_cast<const Int32*>(block_tables.data());
    input.table_stride = block_tables.shape(1);
    for (Int32 row = 0; row < input.rows; ++row) {
      const std::int64_t needed = (std::int64_t{input.context_lens[row]} + kBlockTokens - 1) / kBlockTokens;
      if (needed > input.table_stride) fail("the block table of row " + std::to_string(row) + " is too short");
      for (std::int64_t i = 0; i < needed; ++i) {
        const Int32 block = input.block_tables[row * input.table_stride + i];
        if (block < 0 || block >= blocks) fail("the block table of row " + std::to_string(row) + " leaves the cache");
      }
    }
  }
};

py::tuple step(Model& model, const py::array& token_ids, const py::array& positions, const py::array& slots,
               const py::array& starts, const py::array& context_lens, const py::array& block_tables,
               const py::array& draw_tokens, const py::array& pooled_rows,
               const std::pair<py::array, py::array>& embeddings, const py::dict& columns, const Masks& masks) {
  const Checked checked(model, token_ids, positions, slots, starts, context_lens, block_tables, draw_tokens,
                        pooled_rows, embeddings);
  const Network& network = model.network();
  const SamplingCall sampling(columns, masks, checked.input.draws, network.vocab);
  const float* pooled = nullptr;
  {
    const py::gil_scoped_release release;
    pooled = model.step(checked.input, sampling.input, sampling.output);
  }
  return py::make_tuple(sampling.results(),
                        py::array_t<float>({py::ssize_t{checked.input.pooled}, py::ssize_t{network.hidden}}, pooled));
}

void check_block(Model& model, Int32 block) {
  if (block < 0 || block >= model.kv().blocks()) fail("block " + std::to_string(block) + " is outside the cache");
}

void copy_blocks(Model& model, const std::vector<std::pair<Int32, Int32>>& pairs) {
  for (const auto& [source, target] : pairs) {
    check_block(model, source);
    check_block(model, target);
    model.kv().copy_block(source, target);
  }
}

py::bytes export_blocks(Model& model, const std::vector<Int32>& blocks) {
  std::string data(blocks.size() * model.kv().block_bytes(), '\0');
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    check_block(model, blocks[i]);
    model.kv().read_block(blocks[i], reinterpret_cast<std::byte*>(data.data()) + i * model.kv().block_bytes());
  }
  return {data};
}

void import_blocks(Model& model, const std::vector<Int32>& blocks, const py::bytes& data) {
  const auto view = static_cast<std::string_view>(data);
  const std::size_t expected = blocks.size() * model.kv().block_bytes();
  if (view.size() != expected) {
    fail(std::to_string(blocks.size()) + " blocks take " + std::to_string(expected) + " bytes, not " +
         std::to_string(view.size()));
  }
  for (const Int32 block : blocks) check_block(model, block);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    model.kv().write_block(blocks[i], reinterpret_cast<const std::byte*>(view.data()) + i * model.kv().block_bytes());
  }
}

}  // namespace

void bind_model(py::module_& module) {
  module.attr("BLOCK_TOKENS") = kBlockTokens;
  module.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  module.attr("MAX_INPUTS") = kMaxInputs;
  module.def("available_cores", &available_cores, "Cores that this process may use, or fewer under a CPU quota.");
  py::class_<Model>(module, "Model", "A loaded model.")
      .def(py::init([](Network network, Weights& weights, const std::string& kv_type, Int32 kv_blocks,
                       std::shared_ptr<Pool> pool) {
             return std::make_unique<Model>(std::move(network), std::make_unique<Weights>(std::move(weights)),
                                            kv_type_of(kv_type), kv_blocks, std::move(pool), current_isa());
           }),
           py::arg("network"), py::arg("weights"), py::arg("kv_type"), py::arg("kv_blocks"), py::arg("pool"),
           "Takes the memory of `weights` over.")
      .def("step", &step)
      .def(
          "logits",
          [](const Model& model) {
            return py::array_t<float>({py::ssize_t{model.draws()}, py::ssize_t{model.network().vocab}}, model.logits());
          },
          "Of the last step, before penalties and masks.")
      .def_property_readonly("progress", &Model::progress)
      .def_property_readonly("weight_bytes", &Model::weight_bytes)
      .def_property_readonly("block_bytes", [](Model& model) { return model.kv().block_bytes(); })
      .def("copy_blocks", &copy_blocks)
      .def("export_blocks", &export_blocks)
      .def("import_blocks", &import_blocks);
  module.def(
      "kv_block_bytes",
      [](const std::string& type, Int32 kv_heads, Int32 head_dim) {
        return 2 * kv_block_bytes(kv_type_of(type), kv_heads, head_dim) + kv_scale_bytes(kv_type_of(type), kv_heads);
      },
      py::arg("type"), py::arg("kv_heads"), py::arg("head_dim"), "Bytes of one block of one layer.");
}

}  // namespace millrace::bindings

// The face is kernels/attention.py.
#include "millrace/attention.h"

#include <cstdint>
#include <string>

#include "arrays.h"
#include "bindings.h"

namespace millrace::bindings {
namespace {

constexpr auto kFloat = static_cast<py::ssize_t>(sizeof(float));

// The parts of a kernels.attention.KVCache, which made them: only what may have been changed is looked at.
KVCache cache_of(const py::object& parts) {
  auto keys = parts.attr("keys").cast<py::array>();
  auto values = parts.attr("values").cast<py::array>();
  auto scales = parts.attr("scales").cast<py::array>();
  const auto head_dim = parts.attr("head_dim").cast<std::int32_t>();
  const auto blocks = static_cast<std::int32_t>(keys.shape(0)), kv_heads = static_cast<std::int32_t>(keys.shape(1));
  const KVType type = keys.itemsize() == 1 ? KVType::int8 : KVType::bf16;
  return {type,
          blocks,
          kv_heads,
          head_dim,
          static_cast<std::byte*>(keys.mutable_data()),
          static_cast<std::byte*>(values.mutable_data()),
          type == KVType::int8 ? static_cast<float*>(scales.mutable_data()) : nullptr};
}

// float32 [tokens, columns], its rows contiguous, with any stride between them.
const float* rows_of(const py::array& array, const char* name, py::ssize_t tokens, py::ssize_t columns) {
  const std::string is = std::string(name) + " must be ";
  if (!array.dtype().equal(py::dtype::of<float>()) || array.ndim() != 2 || array.shape(1) != columns ||
      (tokens >= 0 && array.shape(0) != tokens)) {
    fail(is + "float32 [" + (tokens < 0 ? "tokens" : std::to_string(tokens)) + ", " + std::to_string(columns) + "]");
  }
  const bool contiguous = array.size() == 0 || columns == 1 || array.strides(1) == kFloat;
  if (!contiguous || array.strides(0) % kFloat != 0 ||
      reinterpret_cast<std::uintptr_t>(array.data()) % alignof(float) != 0) {
    fail("rows of " + std::string(name) + " must be contiguous and aligned");
  }
  return static_cast<const float*>(array.data());
}

void write(const py::object& into, const py::array& slots, const py::array& keys, const py::array& values) {
  const KVCache cache = cache_of(into);
  const py::ssize_t columns = py::ssize_t{cache.kv_heads} * cache.head_dim;
  const float* k = rows_of(keys, "keys", -1, columns);
  const float* v = rows_of(values, "values", keys.shape(0), columns);
  const std::int64_t end = std::int64_t{cache.blocks} * kBlockTokens;
  const auto* slot = checked<std::int64_t>(slots, "slots", keys.shape(0), "the cache",
                                           [end](std::int64_t s) { return s >= 0 && s < end; });
  const py::ssize_t k_stride = keys.strides(0) / kFloat, v_stride = values.strides(0) / kFloat, tokens = keys.shape(0);
  const Isa isa = current_isa();
  const py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < tokens; ++i) write_kv(cache, slot[i], k + i * k_stride, v + i * v_stride, isa);
}

void set_batch(AttentionInput& in, const py::array& offsets_array, const py::array& context_lens,
               const py::array& block_tables, py::ssize_t tokens) {
  if (!block_tables.dtype().equal(py::dtype::of<std::int32_t>()) || block_tables.ndim() != 2 ||
      (block_tables.flags() & py::array::c_style) == 0) {
    fail("block_tables must be contiguous int32 [rows, blocks]");
  }
  const py::ssize_t rows = block_tables.shape(0);
  in.rows = static_cast<std::int32_t>(rows);
  in.offsets = offsets(offsets_array, "offsets", rows, tokens);
  in.context_lens = column<std::int32_t>(context_lens, "context_lens", rows);
  in.block_tables = static_cast<const std::int32_t*>(block_tables.data());
  in.table_stride = block_tables.shape(1);
  for (std::int32_t row = 0; row < in.rows; ++row) {
    const std::int32_t context = in.context_lens[row];
    const std::string name = "context_lens[" + std::to_string(row) + "] = " + std::to_string(context);
    if (context < in.offsets[row + 1] - in.offsets[row]) fail(name + " is less than the row has tokens");
    if (context > in.table_stride * kBlockTokens) fail(name + " is more than the row's blocks hold");
    for (std::int32_t i = 0; i * kBlockTokens < context; ++i) {
      const std::int32_t block = in.block_tables[row * in.table_stride + i];
      if (block >= 0 && block < in.cache.blocks) continue;
      fail("block_tables[" + std::to_string(row) + ", " + std::to_string(i) + "] = " + std::to_string(block) +
           ": there is no such block");
    }
  }
}

void attend(const py::array& q, const py::object& parts, std::int32_t heads, const py::array& offsets_array,
            const py::array& context_lens, const py::array& block_tables, float scale, bool causal, std::int32_t window,
            std::int32_t threads, py::array_t<float>& out) {
  AttentionInput in{};
  in.cache = cache_of(parts);
  if (heads < 1 || heads % in.cache.kv_heads != 0) fail("heads must be a multiple of the cache's KV heads");
  if (window < 0) fail("window must not be negative");
  if (threads < 1) fail("threads must be at least 1");
  in.heads = heads;
  in.scale = scale;
  in.causal = causal;
  in.window = window;
  const py::ssize_t columns = py::ssize_t{heads} * in.cache.head_dim;
  in.q = rows_of(q, "q", -1, columns);
  in.q_stride = q.strides(0) / kFloat;
  set_batch(in, offsets_array, context_lens, block_tables, q.shape(0));
  rows_of(out, "out", q.shape(0), columns);
  in.out = out.mutable_data();
  in.out_stride = out.strides(0) / kFloat;
  const Isa isa = current_isa();

  const py::gil_scoped_release release;
  thread_local AttentionPlan plan;
  plan.make(in, threads);
  for (std::int32_t thread = threads - 1; thread >= 0; --thread) {
    for (std::int32_t i = thread; i < plan.items(); i += threads) attend(in, plan, i, i + 1, thread, isa);
  }
  merge(in, plan, 0, plan.merges(), isa);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("write_kv", &write, py::arg("cache"), py::arg("slots"), py::arg("keys"), py::arg("values"),
             "See millrace.kernels.attention.write.");
  module.def("attend", &attend, py::kw_only(), py::arg("q"), py::arg("cache"), py::arg("heads"), py::arg("offsets"),
             py::arg("context_lens"), py::arg("block_tables"), py::arg("scale"), py::arg("causal"), py::arg("window"),
             py::arg("threads"), py::arg("out"), "See millrace.kernels.attention.attend.");
}

}  // namespace millrace::bindings

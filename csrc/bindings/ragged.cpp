// The face is kernels/ragged.py.
#include <algorithm>
#include <cstdint>
#include <string>

#include "arrays.h"
#include "bindings.h"

namespace millrace::bindings {
namespace {

using Ids = py::array_t<std::int32_t>;

std::int32_t blocks_of(std::int32_t tokens, std::int32_t block_size) {
  return tokens / block_size + (tokens % block_size != 0 ? 1 : 0);
}

const std::int32_t* row_numbers(const py::array& array, const char* name, std::int32_t rows) {
  return checked<std::int32_t>(array, name, -1, "the rows of the table",
                               [rows](std::int32_t row) { return row >= 0 && row < rows; });
}

// [rows + 1]: where each row begins and the last one ends, if row i has length(i) numbers.
template <typename Length>
Ids starts_of(py::ssize_t rows, Length length) {
  Ids starts(rows + 1);
  std::int32_t* at = starts.mutable_data();
  std::int64_t end = at[0] = 0;
  for (py::ssize_t i = 0; i < rows; ++i) {
    end += length(i);
    if (end > 0x7fffffff) fail("the rows have more than 2147483647 numbers together");
    at[i + 1] = static_cast<std::int32_t>(end);
  }
  return starts;
}

py::tuple pack_tokens(const py::array& lanes, const py::array& starts, const py::array& ends, const py::array& tokens,
                      const py::array& blocks, std::int32_t block_size) {
  if (block_size < 1) fail("block_size must be at least 1");
  const auto known = rows_of<std::int32_t>(tokens, "tokens", false);
  const auto owned = rows_of<std::int32_t>(blocks, "blocks", false);
  const auto* lane = row_numbers(lanes, "lanes", std::min(known.rows, owned.rows));
  const py::ssize_t rows = lanes.shape(0);
  const auto* end = checked<std::int32_t>(
      ends, "ends", rows, "[0, width of tokens and of blocks]",
      [&](std::int32_t v) { return v >= 0 && v <= known.size && blocks_of(v, block_size) <= owned.size; });
  const auto* start = column<std::int32_t>(starts, "starts", rows);
  std::int32_t widest = 0;
  for (py::ssize_t i = 0; i < rows; ++i) {
    if (start[i] < 0 || start[i] > end[i]) fail("starts[" + std::to_string(i) + "] must be in [0, end]");
    widest = std::max(widest, blocks_of(end[i], block_size));
  }
  const Ids offsets = starts_of(rows, [&](py::ssize_t i) { return end[i] - start[i]; });
  const std::int32_t* offset = offsets.data();
  Ids token_ids(offset[rows]), positions(offset[rows]), slots(offset[rows]), block_tables({rows, py::ssize_t{widest}});
  std::int32_t *token = token_ids.mutable_data(), *at = positions.mutable_data(), *slot = slots.mutable_data();
  std::int32_t* table = block_tables.mutable_data();
  {
    const py::gil_scoped_release release;
    for (py::ssize_t i = 0; i < rows; ++i, table += widest) {
      const std::int32_t *ids = known.row(lane[i]), *block = owned.row(lane[i]);
      std::fill(std::copy_n(block, blocks_of(end[i], block_size), table), table + widest, -1);
      for (std::int32_t position = start[i]; position < end[i]; ++position) {
        *token++ = ids[position];
        *at++ = position;
        *slot++ =
            static_cast<std::int32_t>(std::int64_t{block[position / block_size]} * block_size + position % block_size);
      }
    }
  }
  return py::make_tuple(token_ids, positions, slots, offsets, block_tables);
}

template <typename T>
py::tuple gather_of(const py::array& table, const py::array& rows, const py::array& lens) {
  const auto from = rows_of<T>(table, "table", false);
  const auto* row = row_numbers(rows, "rows", from.rows);
  const auto* len = checked<std::int32_t>(lens, "lens", rows.shape(0), "[0, width of the table]",
                                          [&](std::int32_t v) { return v >= 0 && v <= from.size; });
  const py::ssize_t count = rows.shape(0);
  const Ids offsets = starts_of(count, [&](py::ssize_t i) { return len[i]; });
  py::array_t<T> values(offsets.data()[count]);
  T* to = values.mutable_data();
  {
    const py::gil_scoped_release release;
    for (py::ssize_t i = 0; i < count; ++i) to = std::copy_n(from.row(row[i]), len[i], to);
  }
  return py::make_tuple(offsets, values);
}

py::tuple gather(const py::array& table, const py::array& rows, const py::array& lens) {
  if (table.dtype().equal(py::dtype::of<float>())) return gather_of<float>(table, rows, lens);
  if (table.dtype().equal(py::dtype::of<std::int32_t>())) return gather_of<std::int32_t>(table, rows, lens);
  fail("table must be int32 or float32, not " + std::string(py::str(table.dtype())));
}

void append(const py::array& table, const py::array& lens, const py::array& rows, const py::array& values) {
  const auto into = rows_of<std::int32_t>(table, "table", true);
  column<std::int32_t>(lens, "lens", into.rows);
  if (!lens.writeable()) fail("lens must be writeable");
  auto* len = static_cast<std::int32_t*>(const_cast<void*>(lens.data()));
  const auto* row = row_numbers(rows, "rows", into.rows);
  const auto* value = column<std::int32_t>(values, "values", rows.shape(0));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    std::int32_t& length = len[row[i]];
    if (length < 0 || length >= into.size) {
      for (py::ssize_t before = 0; before < i; ++before) --len[row[before]];
      fail("row " + std::to_string(row[i]) + " has no room for another number");
    }
    into.row(row[i])[length++] = value[i];
  }
}

}  // namespace

void bind_ragged(py::module_& module) {
  module.def("pack_tokens", &pack_tokens, py::arg("lanes"), py::arg("starts"), py::arg("ends"), py::arg("tokens"),
             py::arg("blocks"), py::arg("block_size"));
  module.def("gather", &gather, py::arg("table"), py::arg("rows"), py::arg("lens"));
  module.def("append", &append, py::arg("table"), py::arg("lens"), py::arg("rows"), py::arg("values"));
}

}  // namespace millrace::bindings

// The face is kernels/sampling.py.
#include "sampling.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"

namespace millrace::bindings {

SamplingCall::SamplingCall(py::dict columns, Masks masks, std::int32_t rows, std::int32_t vocab)
    : columns_(std::move(columns)), masks_(std::move(masks)), token_ids_(rows), logprobs_(rows) {
  input.rows = rows;
  input.vocab = vocab;
  input.row_stride = vocab;
  set_parameters();
  set_ragged();
  set_masks();
  const std::int32_t most = rows == 0 ? 0 : *std::max_element(input.top_n, input.top_n + rows);
  const std::int32_t width = std::clamp(most, 0, vocab);
  const auto room = static_cast<std::size_t>(rows) * static_cast<std::size_t>(width);
  status_.resize(static_cast<std::size_t>(rows));
  top_ids_.resize(room);
  top_logprobs_.resize(room);
  output = {token_ids_.mutable_data(), logprobs_.mutable_data(), status_.data(), width,
            top_ids_.data(),           top_logprobs_.data()};
}

py::array SamplingCall::column_named(const char* name) const {
  if (!columns_.contains(name)) fail(std::string("the column ") + name + " is missing");
  return columns_[name].cast<py::array>();
}

void SamplingCall::set_parameters() {
  const auto not_negative = [](auto v) { return v >= 0; };
  const auto finite = [](float v) { return std::isfinite(v); };
  const auto floats = [&](const char* name, const char* range, auto inside) {
    return checked<float>(column_named(name), name, input.rows, range, inside);
  };
  const auto integers = [&](const char* name, const char* range, auto inside) {
    return checked<std::int32_t>(column_named(name), name, input.rows, range, inside);
  };
  input.temperature = floats("temperature", "[0, inf)", [](float v) { return v >= 0 && std::isfinite(v); });
  input.top_p = floats("top_p", "(0, 1]", [](float v) { return v > 0 && v <= 1; });
  input.top_k = integers("top_k", "[0, inf)", not_negative);
  input.min_p = floats("min_p", "[0, 1]", [](float v) { return v >= 0 && v <= 1; });
  input.presence_penalty = floats("presence_penalty", "(-inf, inf)", finite);
  input.frequency_penalty = floats("frequency_penalty", "(-inf, inf)", finite);
  input.repetition_penalty =
      floats("repetition_penalty", "(0, inf)", [](float v) { return v > 0 && std::isfinite(v); });
  input.seed = column<std::uint64_t>(column_named("seed"), "seed", input.rows);
  input.choice = integers("choice", "[0, inf)", not_negative);
  input.position = integers("position", "[0, inf)", not_negative);
  input.top_n = integers("top_n", "[-1, inf)", [](std::int32_t v) { return v >= -1; });
}

void SamplingCall::set_ragged() {
  const auto token = [&](std::int32_t v) { return v >= 0 && v < input.vocab; };
  const auto tokens = [&](const char* name) {
    return checked<std::int32_t>(column_named(name), name, -1, "[0, vocabulary)", token);
  };
  const py::ssize_t biases = column_named("bias_ids").size(), history = column_named("history_ids").size();
  input.bias_ids = tokens("bias_ids");
  input.bias_values = checked<float>(column_named("bias_values"), "bias_values", biases, "(-inf, inf)",
                                     [](float v) { return std::isfinite(v); });
  input.bias_offsets = offsets(column_named("bias_offsets"), "bias_offsets", input.rows, biases);
  input.history_ids = tokens("history_ids");
  input.history_offsets = offsets(column_named("history_offsets"), "history_offsets", input.rows, history);
  input.history_prompt_lens = checked<std::int32_t>(column_named("history_prompt_lens"), "history_prompt_lens",
                                                    input.rows, "[0, inf)", [](std::int32_t v) { return v >= 0; });
  for (std::int32_t row = 0; row < input.rows; ++row) {
    if (input.history_prompt_lens[row] > input.history_offsets[row + 1] - input.history_offsets[row]) {
      fail("history_prompt_lens[" + std::to_string(row) + "] is longer than the history of the row");
    }
  }
}

void SamplingCall::set_masks() {
  mask_pointers_.assign(static_cast<std::size_t>(input.rows), nullptr);
  for (const auto& [row, words] : masks_) {
    if (row < 0 || row >= input.rows) fail("mask of row " + std::to_string(row) + ": there is no such row");
    const std::uint32_t*& pointer = mask_pointers_[static_cast<std::size_t>(row)];
    if (pointer != nullptr) fail("row " + std::to_string(row) + " has two masks");
    pointer = column<std::uint32_t>(words, "mask", (py::ssize_t{input.vocab} + 31) / 32);
  }
  input.masks = mask_pointers_.data();
}

py::tuple SamplingCall::results() const {
  py::array_t<std::int32_t> codes(input.rows);
  std::transform(status_.begin(), status_.end(), codes.mutable_data(),
                 [](SamplingStatus s) { return static_cast<std::int32_t>(s); });
  const py::tuple top = compact_top();
  return py::make_tuple(token_ids_, logprobs_, top[0], top[1], top[2], codes);
}

// Drops the room that rows did not ask for.
py::tuple SamplingCall::compact_top() const {
  py::array_t<std::int32_t> starts(input.rows + 1);
  std::vector<std::int32_t> kept_ids;
  std::vector<float> kept_logprobs;
  starts.mutable_at(0) = 0;
  for (std::int32_t row = 0; row < input.rows; ++row) {
    const bool ok = status_[static_cast<std::size_t>(row)] == SamplingStatus::ok;
    const std::int32_t count = ok ? std::clamp(input.top_n[row], 0, input.vocab) : 0;
    const auto at = static_cast<std::ptrdiff_t>(row) * output.top_width;
    kept_ids.insert(kept_ids.end(), top_ids_.begin() + at, top_ids_.begin() + at + count);
    kept_logprobs.insert(kept_logprobs.end(), top_logprobs_.begin() + at, top_logprobs_.begin() + at + count);
    starts.mutable_at(row + 1) = static_cast<std::int32_t>(kept_ids.size());
  }
  const auto size = static_cast<py::ssize_t>(kept_ids.size());
  return py::make_tuple(starts, py::array_t<std::int32_t>(size, kept_ids.data()),
                        py::array_t<float>(size, kept_logprobs.data()));
}

namespace {

void check_logits(const py::array& logits) {
  constexpr auto kFloat = static_cast<py::ssize_t>(sizeof(float));
  if (!logits.dtype().equal(py::dtype::of<float>()) || logits.ndim() != 2) {
    fail("logits must be a float32 array of [rows, vocabulary]");
  }
  constexpr py::ssize_t kMost = std::numeric_limits<std::int32_t>::max();
  if (logits.shape(1) < 1 || logits.shape(1) > kMost || logits.shape(0) > kMost) {
    fail("logits must have 1 to 2147483647 columns and at most as many rows");
  }
  const bool contiguous = logits.size() == 0 || logits.shape(1) == 1 || logits.strides(1) == kFloat;
  if (!contiguous || logits.strides(0) % kFloat != 0 ||
      reinterpret_cast<std::uintptr_t>(logits.data()) % alignof(float) != 0) {
    fail("rows of logits must be contiguous and aligned");
  }
}

py::tuple sample(const py::array& logits, const py::dict& columns, const Masks& masks) {
  check_logits(logits);
  SamplingCall call(columns, masks, static_cast<std::int32_t>(logits.shape(0)),
                    static_cast<std::int32_t>(logits.shape(1)));
  call.input.logits = static_cast<const float*>(logits.data());
  call.input.row_stride = logits.strides(0) / static_cast<py::ssize_t>(sizeof(float));
  const Isa isa = current_isa();
  {
    const py::gil_scoped_release release;
    millrace::sample(call.input, call.output, isa, 0, call.input.rows);
  }
  return call.results();
}

}  // namespace

void bind_sampling(py::module_& module) {
  module.def("sample", &sample, py::arg("logits"), py::arg("columns"), py::arg("masks"),
             "See millrace.kernels.sampling.sample.");
}

}  // namespace millrace::bindings

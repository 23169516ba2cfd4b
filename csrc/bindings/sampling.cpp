// The face is kernels/sampling.py.
#include "millrace/sampling.h"

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
namespace {

void set_logits(const py::array& logits, SamplingInput& input) {
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
  input.logits = static_cast<const float*>(logits.data());
  input.rows = static_cast<std::int32_t>(logits.shape(0));
  input.vocab = static_cast<std::int32_t>(logits.shape(1));
  input.row_stride = logits.strides(0) / kFloat;
}

using Masks = std::vector<std::pair<std::int64_t, py::array>>;

std::vector<const std::uint32_t*> mask_pointers(const Masks& masks, const SamplingInput& input) {
  std::vector<const std::uint32_t*> pointers(static_cast<std::size_t>(input.rows), nullptr);
  for (const auto& [row, words] : masks) {
    if (row < 0 || row >= input.rows) fail("mask of row " + std::to_string(row) + ": there is no such row");
    const std::uint32_t*& pointer = pointers[static_cast<std::size_t>(row)];
    if (pointer != nullptr) fail("row " + std::to_string(row) + " has two masks");
    pointer = column<std::uint32_t>(words, "mask", (py::ssize_t{input.vocab} + 31) / 32);
  }
  return pointers;
}

// Drops the entries of rows that failed, and the room that rows did not ask for.
py::tuple compact(const SamplingInput& input, const std::vector<SamplingStatus>& status, py::ssize_t width,
                  const std::vector<std::int32_t>& ids, const std::vector<float>& logprobs) {
  py::array_t<std::int32_t> starts(input.rows + 1);
  std::vector<std::int32_t> kept_ids;
  std::vector<float> kept_logprobs;
  starts.mutable_at(0) = 0;
  for (std::int32_t row = 0; row < input.rows; ++row) {
    const bool ok = status[static_cast<std::size_t>(row)] == SamplingStatus::ok;
    const std::int32_t count = ok ? std::clamp(input.top_n[row], 0, input.vocab) : 0;
    const auto at = static_cast<std::ptrdiff_t>(row * width);
    kept_ids.insert(kept_ids.end(), ids.begin() + at, ids.begin() + at + count);
    kept_logprobs.insert(kept_logprobs.end(), logprobs.begin() + at, logprobs.begin() + at + count);
    starts.mutable_at(row + 1) = static_cast<std::int32_t>(kept_ids.size());
  }
  const auto size = static_cast<py::ssize_t>(kept_ids.size());
  return py::make_tuple(starts, py::array_t<std::int32_t>(size, kept_ids.data()),
                        py::array_t<float>(size, kept_logprobs.data()));
}

py::tuple sample(const py::array& logits, const py::array& temperature, const py::array& top_p, const py::array& top_k,
                 const py::array& min_p, const py::array& presence_penalty, const py::array& frequency_penalty,
                 const py::array& repetition_penalty, const py::array& seed, const py::array& choice,
                 const py::array& position, const py::array& top_n, const py::array& bias_offsets,
                 const py::array& bias_ids, const py::array& bias_values, const py::array& history_offsets,
                 const py::array& history_ids, const py::array& history_prompt_lens, const Masks& masks) {
  SamplingInput in{};
  set_logits(logits, in);
  const py::ssize_t rows = in.rows;
  const auto not_negative = [](auto v) { return v >= 0; };
  const auto finite = [](float v) { return std::isfinite(v); };
  const auto token = [&in](std::int32_t v) { return v >= 0 && v < in.vocab; };
  in.temperature =
      checked<float>(temperature, "temperature", rows, "[0, inf)", [](float v) { return v >= 0 && std::isfinite(v); });
  in.top_p = checked<float>(top_p, "top_p", rows, "(0, 1]", [](float v) { return v > 0 && v <= 1; });
  in.top_k = checked<std::int32_t>(top_k, "top_k", rows, "[0, inf)", not_negative);
  in.min_p = checked<float>(min_p, "min_p", rows, "[0, 1]", [](float v) { return v >= 0 && v <= 1; });
  in.presence_penalty = checked<float>(presence_penalty, "presence_penalty", rows, "(-inf, inf)", finite);
  in.frequency_penalty = checked<float>(frequency_penalty, "frequency_penalty", rows, "(-inf, inf)", finite);
  in.repetition_penalty = checked<float>(repetition_penalty, "repetition_penalty", rows, "(0, inf)",
                                         [](float v) { return v > 0 && std::isfinite(v); });
  in.seed = column<std::uint64_t>(seed, "seed", rows);
  in.choice = checked<std::int32_t>(choice, "choice", rows, "[0, inf)", not_negative);
  in.position = checked<std::int32_t>(position, "position", rows, "[0, inf)", not_negative);
  in.top_n = checked<std::int32_t>(top_n, "top_n", rows, "[-1, inf)", [](std::int32_t v) { return v >= -1; });
  in.bias_ids = checked<std::int32_t>(bias_ids, "bias_ids", -1, "[0, vocabulary)", token);
  in.bias_values = checked<float>(bias_values, "bias_values", bias_ids.shape(0), "(-inf, inf)", finite);
  in.bias_offsets = offsets(bias_offsets, "bias_offsets", rows, bias_ids.shape(0));
  in.history_ids = checked<std::int32_t>(history_ids, "history_ids", -1, "[0, vocabulary)", token);
  in.history_offsets = offsets(history_offsets, "history_offsets", rows, history_ids.shape(0));
  in.history_prompt_lens =
      checked<std::int32_t>(history_prompt_lens, "history_prompt_lens", rows, "[0, inf)", not_negative);
  for (py::ssize_t row = 0; row < rows; ++row) {
    if (in.history_prompt_lens[row] > in.history_offsets[row + 1] - in.history_offsets[row]) {
      fail("history_prompt_lens[" + std::to_string(row) + "] is longer than the history of the row");
    }
  }
  const std::vector<const std::uint32_t*> pointers = mask_pointers(masks, in);
  in.masks = pointers.data();
  const Isa isa = current_isa();

  const std::int32_t most = rows == 0 ? 0 : *std::max_element(in.top_n, in.top_n + rows);
  const std::int32_t width = std::clamp(most, 0, in.vocab);
  const auto room = static_cast<std::size_t>(rows) * static_cast<std::size_t>(width);
  std::vector<std::int32_t> top_ids(room);
  std::vector<float> top_logprobs(room);
  std::vector<SamplingStatus> status(static_cast<std::size_t>(rows));
  py::array_t<std::int32_t> token_ids(rows);
  py::array_t<float> logprobs(rows);
  const SamplingOutput out{token_ids.mutable_data(), logprobs.mutable_data(), status.data(), width,
                           top_ids.data(),           top_logprobs.data()};
  {
    const py::gil_scoped_release release;
    millrace::sample(in, out, isa, 0, in.rows);
  }
  py::array_t<std::int32_t> codes(rows);
  std::transform(status.begin(), status.end(), codes.mutable_data(),
                 [](SamplingStatus s) { return static_cast<std::int32_t>(s); });
  const py::tuple top = compact(in, status, width, top_ids, top_logprobs);
  return py::make_tuple(token_ids, logprobs, top[0], top[1], top[2], codes);
}

}  // namespace

void bind_sampling(py::module_& module) {
  module.def("sample", &sample, py::kw_only(), py::arg("logits"), py::arg("temperature"), py::arg("top_p"),
             py::arg("top_k"), py::arg("min_p"), py::arg("presence_penalty"), py::arg("frequency_penalty"),
             py::arg("repetition_penalty"), py::arg("seed"), py::arg("choice"), py::arg("position"), py::arg("top_n"),
             py::arg("bias_offsets"), py::arg("bias_ids"), py::arg("bias_values"), py::arg("history_offsets"),
             py::arg("history_ids"), py::arg("history_prompt_lens"), py::arg("masks"),
             "See millrace.kernels.sampling.sample.");
}

}  // namespace millrace::bindings

// Sampling parameters as they come from Python, and the tokens as they go back.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "millrace/sampling.h"

namespace millrace::bindings {

namespace py = pybind11;

using Masks = std::vector<std::pair<std::int64_t, py::array>>;

// Checks every column of `rows` rows and makes room for the results. `input.logits` is for the caller to set.
// Holds the arrays: their memory is there as long as this is.
class SamplingCall {
 public:
  SamplingCall(py::dict columns, Masks masks, std::int32_t rows, std::int32_t vocab);
  SamplingCall(const SamplingCall&) = delete;
  SamplingCall& operator=(const SamplingCall&) = delete;

  SamplingInput input{};
  SamplingOutput output{};

  // token_ids, logprobs, top_offsets, top_token_ids, top_logprobs, status. Rows that failed report nothing.
  py::tuple results() const;

 private:
  py::array column_named(const char* name) const;
  void set_parameters();
  void set_ragged();
  void set_masks();
  py::tuple compact_top() const;

  py::dict columns_;
  Masks masks_;
  std::vector<const std::uint32_t*> mask_pointers_;
  std::vector<SamplingStatus> status_;
  std::vector<std::int32_t> top_ids_;
  std::vector<float> top_logprobs_;
  py::array_t<std::int32_t> token_ids_;
  py::array_t<float> logprobs_;
};

}  // namespace millrace::bindings

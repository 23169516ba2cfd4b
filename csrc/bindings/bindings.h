// What each slice adds to millrace.kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace millrace::bindings {

void bind_sampling(pybind11::module_& module);
void bind_matmul(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_ragged(pybind11::module_& module);
void bind_sequences(pybind11::module_& module);
void bind_weights(pybind11::module_& module);
void bind_model(pybind11::module_& module);
void bind_roof(pybind11::module_& module);

}  // namespace millrace::bindings

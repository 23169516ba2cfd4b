// The face is kernels/attention.py.
#include "bindings.h"

namespace millrace::bindings {

void bind_attention(pybind11::module_&) {}

}  // namespace millrace::bindings

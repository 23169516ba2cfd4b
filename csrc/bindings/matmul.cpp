// The face is kernels/matmul.py.
#include "bindings.h"

namespace millrace::bindings {

void bind_matmul(pybind11::module_&) {}

}  // namespace millrace::bindings

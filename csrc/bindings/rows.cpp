// The face is kernels/rows.py.
#include "bindings.h"

namespace millrace::bindings {

void bind_rows(pybind11::module_&) {}

}  // namespace millrace::bindings

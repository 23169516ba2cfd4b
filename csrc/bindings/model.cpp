// The face is server/model/executors/cpu.py.
#include "bindings.h"

namespace millrace::bindings {

void bind_model(pybind11::module_&) {}

}  // namespace millrace::bindings

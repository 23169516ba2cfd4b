// millrace.kernels._C: checks arrays, then calls csrc without the GIL. This folder alone knows pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"

namespace millrace::bindings {

Isa current_isa() { return choose_isa(std::getenv("MILLRACE_ISA")); }

}  // namespace millrace::bindings

PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
  module.doc() = "Native kernels; the documented faces are the modules of millrace.kernels.";
  module.def(
      "isa", [] { return millrace::name(millrace::bindings::current_isa()); },
      "The instruction set the kernels run with: the fastest of this machine, or MILLRACE_ISA.");
  module.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (const millrace::Isa isa : millrace::available_isas()) names.push_back(millrace::name(isa));
        return names;
      },
      "Instruction sets this machine can run, slowest first.");
  millrace::bindings::bind_sampling(module);
  millrace::bindings::bind_matmul(module);
  millrace::bindings::bind_attention(module);
  millrace::bindings::bind_rows(module);
  millrace::bindings::bind_ragged(module);
  millrace::bindings::bind_sequences(module);
  millrace::bindings::bind_weights(module);
  millrace::bindings::bind_model(module);
  millrace::bindings::bind_roof(module);
}

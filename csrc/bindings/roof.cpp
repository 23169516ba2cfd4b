// What the machine can do at most, for millrace.bench.roof.
#include "bench/roof.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bench/pool.h"
#include "bindings.h"
#include "names.h"
#include "runtime/model.h"

namespace py = pybind11;

namespace millrace::bindings {
namespace {

void check(int threads, double seconds) {
  if (threads < 1 || threads > 1024) throw py::value_error("threads must be 1 to 1024");
  if (!(seconds >= 0 && seconds <= 3600)) throw py::value_error("seconds must be in [0, 3600]");
}

std::vector<std::pair<std::string, std::string>> loops() {
  std::vector<std::pair<std::string, std::string>> names;
  for (const roof::Compute& loop : roof::compute_loops()) names.emplace_back(loop.arithmetic, name(loop.isa));
  return names;
}

double compute(const std::string& arithmetic, const std::string& isa, int threads, double seconds) {
  check(threads, seconds);
  for (const roof::Compute& loop : roof::compute_loops()) {
    if (loop.arithmetic != arithmetic || name(loop.isa) != isa) continue;
    const py::gil_scoped_release release;
    return roof::measure_compute(loop, threads, seconds);
  }
  throw py::value_error("this machine has no loop of " + arithmetic + " with " + isa + "; roof_loops() lists them");
}

double read(std::size_t bytes, int threads, double seconds) {
  check(threads, seconds);
  const py::gil_scoped_release release;
  return roof::measure_read(bytes, threads, seconds);
}

double read_weights(const Model& model, int threads, double seconds) {
  check(threads, seconds);
  const py::gil_scoped_release release;
  return roof::measure_read(model.weight_data(), model.weight_bytes(), threads, seconds);
}

// Of one thing that the pool does: a barrier, an empty run, a shared loop, or being idle.
double pool_cost(const std::string& what, int threads, int rounds) {
  check(threads, 0);
  constexpr Word<double (*)(int, int)> kCosts[] = {{"barrier", bench::barrier_nanoseconds},
                                                   {"run", bench::run_nanoseconds},
                                                   {"share", bench::share_nanoseconds},
                                                   {"idle", bench::idle_microseconds}};
  const auto measure = meaning(kCosts, "what", what);
  const py::gil_scoped_release release;
  return measure(threads, rounds);
}

}  // namespace

void bind_roof(py::module_& module) {
  module.def("roof_loops", &loops, "Loops that multiply and add out of registers: pairs of arithmetic and isa.");
  module.def("roof_compute", &compute, py::kw_only(), py::arg("arithmetic"), py::arg("isa"), py::arg("threads"),
             py::arg("seconds"),
             "Operations per second of such a loop on `threads` threads together, in about `seconds`.");
  module.def("roof_read", &read, py::kw_only(), py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
             "Bytes per second that `threads` threads read together out of `bytes` bytes, in about `seconds`.");
  module.def("roof_read_weights", &read_weights, py::kw_only(), py::arg("model"), py::arg("threads"),
             py::arg("seconds"), "The same of a model's weights, where they lie.");
  module.def("pool_cost", &pool_cost, py::kw_only(), py::arg("what"), py::arg("threads"), py::arg("rounds"),
             "Nanoseconds of a barrier, an empty run or a shared loop; processor microseconds of a worker that idles.");
}

}  // namespace millrace::bindings

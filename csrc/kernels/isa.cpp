#include "millrace/isa.h"

#include <stdexcept>

namespace millrace {

std::string name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  throw std::invalid_argument("not an instruction set");
}

std::vector<Isa> available_isas() {
  std::vector<Isa> found{Isa::baseline};
  if (__builtin_cpu_supports("avx2")) found.push_back(Isa::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(Isa::avx512);
  }
  return found;
}

Isa choose_isa(const char* forced) {
  const std::vector<Isa> found = available_isas();
  if (forced == nullptr || *forced == '\0') return found.back();
  std::string names;
  for (const Isa isa : found) {
    if (name(isa) == forced) return isa;
    names += (names.empty() ? "" : ", ") + name(isa);
  }
  throw std::invalid_argument("MILLRACE_ISA=" + std::string(forced) + ": this machine has " + names);
}

}  // namespace millrace

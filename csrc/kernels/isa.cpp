#include "millrace/isa.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "amx.h"

namespace millrace {
namespace {

constexpr std::array<std::pair<Isa, const char*>, 6> kNames{{{Isa::baseline, "baseline"},
                                                             {Isa::avx2, "avx2"},
                                                             {Isa::avx512, "avx512"},
                                                             {Isa::avx512_bf16, "avx512_bf16"},
                                                             {Isa::amx, "amx"},
                                                             {Isa::amx_emulated, "amx_emulated"}}};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

std::string name(Isa isa) {
  for (const auto& [value, text] : kNames) {
    if (value == isa) return text;
  }
  throw std::invalid_argument("not an instruction set");
}

std::vector<Isa> available_isas() {
  std::vector<Isa> found{Isa::baseline};
  if (has_avx2()) found.push_back(Isa::avx2);
  if (has_avx512()) found.push_back(Isa::avx512);
  if (has_avx512_bf16()) found.push_back(Isa::avx512_bf16);
  if (has_avx512_bf16() && has_amx()) found.push_back(Isa::amx);
  return found;
}

Isa choose_isa(const char* forced) {
  static const std::vector<Isa> found = available_isas();
  if (forced == nullptr || *forced == '\0') return found.back();
  if (forced == name(Isa::amx_emulated) && has_avx512_bf16()) return Isa::amx_emulated;
  std::string names;
  for (const Isa isa : found) {
    if (name(isa) == forced) return isa;
    names += (names.empty() ? "" : ", ") + name(isa);
  }
  throw std::invalid_argument("MILLRACE_ISA=" + std::string(forced) + ": this machine has " + names);
}

}  // namespace millrace

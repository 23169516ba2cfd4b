// Instruction sets the kernels choose from at run time. Results do not depend on the choice.
#pragma once

#include <string>
#include <vector>

namespace millrace {

enum class Isa { baseline, avx2, avx512 };

// baseline, avx2 or avx512.
std::string name(Isa isa);

// Those this machine can run, slowest first; never empty.
std::vector<Isa> available_isas();

// The fastest available, or the one named by `forced` (null or empty: not forced).
// Throws std::invalid_argument for an unknown name and for one this machine cannot run.
Isa choose_isa(const char* forced);

}  // namespace millrace

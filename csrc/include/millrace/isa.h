// Instruction sets the kernels choose from at run time.
#pragma once

#include <string>
#include <vector>

namespace millrace {

// Slowest first; each includes those before it.
//   baseline      what every x86-64 has: sampling only
//   avx2          AVX2, FMA, F16C (x86-64-v3)
//   avx512        AVX-512 F, BW, DQ, VL and VNNI (Ice Lake)
//   avx512_bf16   dot products of bf16 (Zen 4, Cooper Lake)
//   amx           tiles of bf16 and int8 (Sapphire Rapids), if the kernel grants them and a self-test passes
//   amx_emulated  the same kernels with the tile instructions spelled out: slow, to be forced in tests
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx, amx_emulated };

std::string name(Isa isa);

// Those this machine can run, slowest first; never empty. `amx_emulated` is not among them.
std::vector<Isa> available_isas();

// The fastest available, or the one named by `forced` (null or empty: not forced).
// Throws std::invalid_argument for an unknown name and for one this machine cannot run.
Isa choose_isa(const char* forced);

}  // namespace millrace

// Deleted with the kernels of amx and amx_emulated in place.
#include <stdexcept>

#include "matmul_kernels.h"

namespace millrace {
namespace {

[[noreturn]] void missing() { throw std::invalid_argument("matrix products on AMX are not built in"); }

}  // namespace

void matmul_bf16_amx(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_bf16_amx_emulated(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_int8_amx(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_int8_amx_emulated(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_int4_amx(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_int4_amx_emulated(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }

}  // namespace millrace

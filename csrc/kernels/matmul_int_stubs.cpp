// Deleted with the kernels of int8 and int4 in place.
#include <stdexcept>

#include "matmul_encode.h"
#include "matmul_kernels.h"
#include "matmul_pack.h"

namespace millrace {
namespace {

[[noreturn]] void missing() { throw std::invalid_argument("int8 and int4 weights are not built in"); }

}  // namespace

bool pack_int8(const PackedMatrix&, std::int32_t, const void* const*, Stored, Isa) { missing(); }
bool pack_int4(const PackedMatrix&, std::int32_t, const void* const*, Stored, Isa) { missing(); }
void unpack_int8(const PackedMatrix&, std::int32_t, float*, Isa) { missing(); }
void unpack_int4(const PackedMatrix&, std::int32_t, float*, Isa) { missing(); }
void encode_int_avx2(const Activations&, std::int32_t, const float*) { missing(); }
void encode_int_avx2(const Activations&, std::int32_t, const std::uint16_t*) { missing(); }
void encode_int_avx512(const Activations&, std::int32_t, const float*) { missing(); }
void encode_int_avx512(const Activations&, std::int32_t, const std::uint16_t*) { missing(); }
void matmul_int8_avx2(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_int8_avx512(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_int4_avx2(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }
void matmul_int4_avx512(const PackedMatrix&, const Activations&, const MatmulOutput&, Ranges) { missing(); }

}  // namespace millrace

#include "simd_avx512.h"

namespace millrace {
namespace {

constexpr int kPanels = 4;  // of 16 columns, times kTogether: sums that fit the registers
constexpr int kVectors = 1;

}  // namespace
}  // namespace millrace

#include "attention_fma.h"
//
#include "attention_body.h"

namespace millrace {

const AttentionKernels attention_avx512{attend_item, merge_parts};

}  // namespace millrace

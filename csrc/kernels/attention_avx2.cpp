#include "simd_avx2.h"

namespace millrace {
namespace {

constexpr int kPanels = 1;  // of 16 columns, times kTogether: sums that fit the registers
constexpr int kVectors = 2;

}  // namespace
}  // namespace millrace

#include "attention_fma.h"
//
#include "attention_body.h"

namespace millrace {

const AttentionKernels attention_avx2{attend_item, merge_parts};

}  // namespace millrace

#include "millrace/attention.h"

#include <stdexcept>

#include "attention_plan.h"

namespace millrace {
namespace {

const AttentionKernels& kernels(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return attention_avx2;
    case Isa::avx512:
      return attention_avx512;
    case Isa::avx512_bf16:
    case Isa::amx:
    case Isa::amx_emulated:
      return attention_avx512_bf16;
    case Isa::baseline:
      break;
  }
  throw std::invalid_argument("attention needs AVX2, FMA and F16C");
}

}  // namespace

void attend(const AttentionInput& input, const AttentionPlan& plan, std::int32_t first, std::int32_t last,
            std::int32_t thread, Isa isa) {
  AttentionPlan::State& state = plan.state();
  const AttentionKernels& set = kernels(isa);
  for (std::int32_t i = first; i < last; ++i) {
    set.attend(input, state.items[static_cast<std::size_t>(i)], state.parts.data(),
               state.scratch[static_cast<std::size_t>(thread)]);
  }
}

void merge(const AttentionInput& input, const AttentionPlan& plan, std::int32_t first, std::int32_t last, Isa isa) {
  AttentionPlan::State& state = plan.state();
  const AttentionKernels& set = kernels(isa);
  for (std::int32_t i = first; i < last; ++i) {
    set.merge(input, state.merges[static_cast<std::size_t>(i)], state.parts.data());
  }
}

}  // namespace millrace

#include "sampling_process.h"

#include <algorithm>
#include <limits>

namespace millrace::sampling {
namespace {

constexpr std::uint32_t kSeen = 1U << 31;

void penalise(const SamplingInput& input, std::int32_t row, float* logits, Workspace& space) {
  const float repetition = input.repetition_penalty[row];
  const float presence = input.presence_penalty[row], frequency = input.frequency_penalty[row];
  const std::int32_t* history = input.history_ids + input.history_offsets[row];
  const std::int32_t length = input.history_offsets[row + 1] - input.history_offsets[row];
  std::uint32_t* occurrences = ensure(space.occurrences, static_cast<std::size_t>(input.vocab));
  for (std::int32_t i = 0; i < length; ++i) {
    std::uint32_t& n = occurrences[history[i]];
    n = (n | kSeen) + (i >= input.history_prompt_lens[row] ? 1U : 0U);
  }
  for (std::int32_t i = 0; i < length; ++i) {
    std::uint32_t& n = occurrences[history[i]];
    if (n == 0) continue;  // its first occurrence has settled it
    float& z = logits[history[i]];
    z = z > 0 ? z / repetition : z * repetition;
    const std::uint32_t in_output = n & ~kSeen;
    if (in_output > 0) z = (z - frequency * static_cast<float>(in_output)) - presence;
    n = 0;
  }
}

void apply_mask(float* logits, std::int32_t vocab, const std::uint32_t* mask) {
  for (std::int32_t begin = 0; begin < vocab; begin += 32) {
    const std::uint32_t word = mask[begin / 32];
    if (word == ~0U) continue;
    for (std::int32_t i = begin, end = std::min(begin + 32, vocab); i < end; ++i) {
      if ((word >> (i - begin) & 1U) == 0) logits[i] = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace

const float* process(const SamplingInput& input, std::int32_t row, const float* logits, Workspace& space) {
  const bool penalised = input.repetition_penalty[row] != 1.0F || input.presence_penalty[row] != 0.0F ||
                         input.frequency_penalty[row] != 0.0F;
  const std::int32_t first = input.bias_offsets[row], last = input.bias_offsets[row + 1];
  const std::uint32_t* mask = input.masks[row];
  if (!penalised && first == last && mask == nullptr) return nullptr;
  float* copy = ensure(space.logits, static_cast<std::size_t>(input.vocab));
  std::copy_n(logits, input.vocab, copy);
  for (std::int32_t i = first; i < last; ++i) copy[input.bias_ids[i]] += input.bias_values[i];
  if (penalised) penalise(input, row, copy, space);
  if (mask != nullptr) apply_mask(copy, input.vocab, mask);
  return copy;
}

}  // namespace millrace::sampling

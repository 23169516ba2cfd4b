// Quantises and packs blocks of integer weights, the same for each instruction set. simd_int_*.h is included before.
#pragma once

#include "hadamard_body.h"
#include "quantization_search.h"

namespace millrace {
namespace {

inline F32 read(Stored stored, const std::byte* p) {
  switch (stored) {
    case Stored::float32:
      return load(reinterpret_cast<const float*>(p));
    case Stored::float16:
      return load_f16(reinterpret_cast<const std::uint16_t*>(p));
    case Stored::bfloat16:
      break;
  }
  return load_bf16(reinterpret_cast<const std::uint16_t*>(p));
}
inline F32 read(Stored stored, const std::byte* p, std::int32_t n) {
  switch (stored) {
    case Stored::float32:
      return load(reinterpret_cast<const float*>(p), n);
    case Stored::float16:
      return load_f16(reinterpret_cast<const std::uint16_t*>(p), n);
    case Stored::bfloat16:
      break;
  }
  return load_bf16(reinterpret_cast<const std::uint16_t*>(p), n);
}

constexpr std::size_t kReadAhead = 512;  // bytes: channels are read by turns, which no hardware foresees

// Numbers [first_k, last_k) of the kLanes channels from `channel` on as products meet them (hadamard.h):
// to[k - first_k][kLanes]; zeros behind `k`. Both ends are multiples of 64. Returns false where one is not finite.
inline bool gather(Channels channels, std::int32_t channel, std::int32_t k, std::int32_t first_k, std::int32_t last_k,
                   float* to) {
  const std::size_t bytes = channels.stored == Stored::float32 ? 4 : 2;
  F32 poison = zero();
  for (std::int32_t first = first_k; first < last_k; first += kHadamard) {
    F32 inputs[kHadamard];
    for (std::int32_t at = first; at < first + kHadamard; at += kLanes) {
      F32 values[kLanes];
#pragma GCC unroll 16
      for (std::int32_t c = 0; c < kLanes; ++c) {
        const auto* data = static_cast<const std::byte*>(channels.data[channel + c]);
        const std::int32_t left = data == nullptr ? 0 : k - at;
        const std::byte* p = left <= 0 ? nullptr : data + static_cast<std::size_t>(at) * bytes;
        values[c] = left <= 0 ? zero() : left >= kLanes ? read(channels.stored, p) : read(channels.stored, p, left);
        if (left > 0) __builtin_prefetch(p + kReadAhead);
      }
      transpose(values);
#pragma GCC unroll 16
      for (std::int32_t i = 0; i < kLanes; ++i) inputs[at - first + i] = values[i];
    }
    if (first + kHadamard <= k) transform_lanes(inputs);
    for (std::int32_t i = 0; i < kHadamard; ++i) {
      poison = fma(inputs[i], zero(), poison);
      store(to + (first - first_k + i) * kLanes, inputs[i]);
    }
  }
  return sum(poison) == 0.0F;
}

// Four codes to a lane, of quads of k.
template <typename Code>
inline I32 quad_of(const Code& code_at) {
  return code_at(0) | shift_left(code_at(1), 8) | shift_left(code_at(2), 16) | shift_left(code_at(3), 24);
}

inline constexpr std::int32_t kVectors = kColumns / kLanes;

inline constexpr float kNoError = 3e38F;  // none found yet
inline constexpr std::int32_t kRefinements = 2;

inline Codes search_int8(const float* w, std::int32_t count, const Lanes& lanes) {
  const auto exact = [](F32 step) { return step; };
  const F32 nearest = where_less(zero(), lanes.largest, fill(1.0F / 127.0F), zero());
  Best best{{nearest, fill(-127.0F), fill(127.0F)}, fill(kNoError)};
  for (std::int32_t i = 0; i < kRefinements; ++i) {
    const Codes refined[1] = {best.codes};
    try_codes(w, count, refined, exact, best);
  }
  return best.codes;
}

inline bool quantize_int8(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch) {
  const std::int32_t padded_k = (matrix.k + 63) / 64 * 64;
  auto* to = matrix.data + static_cast<std::size_t>(block) * static_cast<std::size_t>(padded_k) * kColumns;
  float* scales = static_cast<float*>(matrix.scales) + block * kColumns;
  for (std::int32_t v = 0; v < kVectors; ++v) {
    if (!gather(channels, v * kLanes, matrix.k, 0, padded_k, scratch)) return false;
    const Lanes lanes = normalize(scratch, padded_k);
    const Codes codes = search_int8(scratch, padded_k, lanes);
    store(scales + v * kLanes, codes.step * lanes.largest);
    const F32 inverse = inverse_of(codes.step);
    for (std::int32_t quad = 0; quad < padded_k / 4; ++quad) {
      const I32 packed = quad_of([&](std::int32_t i) {
        return to_int(code(load(scratch + (quad * 4 + i) * kLanes), inverse, codes) + fill(128.0F));
      });
      const std::int32_t line = quad / 16 * 32 + v * 2 / kVectors * 16 + quad % 16;
      store(reinterpret_cast<std::int32_t*>(to + static_cast<std::size_t>(line) * 64) + v % (kVectors / 2) * kLanes,
            packed);
    }
  }
  return true;
}

inline Codes search_int4(const float* w, std::int32_t count, const Lanes& lanes) {
  const auto stored = [&](F32 step) { return round_to_bf16(step * lanes.largest) * lanes.inverse; };
  const auto with_zero = [](F32 step, F32 zero_point) {
    const F32 point = min(max(zero_point, zero()), fill(15.0F));
    return Codes{step, zero() - point, fill(15.0F) - point};
  };
  const auto candidate = [&](float ratio) {
    const F32 step = stored((lanes.high - lanes.low) * fill(ratio / 15.0F));
    return with_zero(step, round((zero() - lanes.low) * fill(ratio) * inverse_of(step)));
  };
  Best best{candidate(1.0F), fill(kNoError)};
  for (std::int32_t i = 0; i < 4; ++i) {
    const auto ratio = static_cast<float>(21 - 2 * i);
    const Codes pair[2] = {candidate(ratio / 20.0F), candidate((ratio - 1.0F) / 20.0F)};
    try_codes(w, count, pair, stored, best);
  }
  for (std::int32_t i = 0; i < kRefinements; ++i) {
    const F32 point = zero() - best.codes.least;
    const Codes neighbours[3] = {best.codes, with_zero(best.codes.step, point - fill(1.0F)),
                                 with_zero(best.codes.step, point + fill(1.0F))};
    try_codes(w, count, neighbours, stored, best);
  }
  return best.codes;
}

inline bool quantize_int4(const PackedMatrix& matrix, std::int32_t block, Channels channels, float* scratch) {
  const std::int32_t padded_k = (matrix.k + 63) / 64 * 64;
  const std::int32_t groups = (padded_k + matrix.group - 1) / matrix.group;
  const std::size_t first_group = static_cast<std::size_t>(block) * static_cast<std::size_t>(groups);
  auto* to = matrix.data + static_cast<std::size_t>(block) * static_cast<std::size_t>(padded_k) * kColumns / 2;
  auto* scales = static_cast<std::uint16_t*>(matrix.scales) + first_group * kColumns;
  std::uint8_t* zeros = matrix.zeros + first_group * kColumns;
  for (std::int32_t first_k = 0; first_k < padded_k; first_k += kMostInputs) {
    const std::int32_t last_k = first_k + kMostInputs < padded_k ? first_k + kMostInputs : padded_k;
    std::int32_t quads[kMostInputs / 4][kColumns];  // codes of tile 0 and, four bits higher, of tile 1
    for (std::int32_t v = 0; v < kVectors; ++v) {
      if (!gather(channels, v * kLanes, matrix.k, first_k, last_k, scratch)) return false;
      for (std::int32_t k = first_k; k < last_k; k += matrix.group) {
        const std::int32_t count = k + matrix.group < last_k ? matrix.group : last_k - k;
        float* w = scratch + (k - first_k) * kLanes;
        const Lanes lanes = normalize(w, count);
        const Codes codes = search_int4(w, count, lanes);
        const F32 inverse = inverse_of(codes.step);
        const std::int32_t at = k / matrix.group * kColumns + v * kLanes;
        store_bf16(scales + at, codes.step * lanes.largest);
        store_bytes(reinterpret_cast<std::int8_t*>(zeros + at), to_int(zero() - codes.least));
        for (std::int32_t quad = 0; quad < count / 4; ++quad) {
          store(quads[(k - first_k) / 4 + quad] + v * kLanes, quad_of([&](std::int32_t i) {
                  return to_int(code(load(w + (quad * 4 + i) * kLanes), inverse, codes) - codes.least);
                }));
        }
      }
    }
    for (std::int32_t quad = 0; quad < (last_k - first_k) / 4; ++quad) {
      auto* line = reinterpret_cast<std::int32_t*>(to + static_cast<std::size_t>(first_k / 4 + quad) * 64);
      for (std::int32_t i = 0; i < kColumns / 2; i += kLanes) {
        store(line + i, load(quads[quad] + i) | shift_left(load(quads[quad] + kColumns / 2 + i), 4));
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace millrace

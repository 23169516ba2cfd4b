// Values by the words that Python has for them.
#pragma once

#include <cstddef>
#include <string>

#include "arrays.h"
#include "millrace/kv_cache.h"
#include "millrace/matmul.h"

namespace millrace::bindings {

template <typename T>
struct Word {
  const char* word;
  T value;
};

inline constexpr Word<Width> kWidths[] = {{"bf16", Width::bf16}, {"int8", Width::int8}, {"int4", Width::int4}};
inline constexpr Word<Activation> kActivations[] = {{"none", Activation::none},
                                                    {"silu", Activation::silu},
                                                    {"gelu", Activation::gelu},
                                                    {"gelu_tanh", Activation::gelu_tanh},
                                                    {"relu", Activation::relu}};
inline constexpr Word<KVType> kKVTypes[] = {{"bf16", KVType::bf16}, {"int8", KVType::int8}};

template <typename T, std::size_t N>
T meaning(const Word<T> (&words)[N], const char* name, const std::string& word) {
  std::string all;
  for (const auto& [text, value] : words) {
    if (word == text) return value;
    all.append(all.empty() ? "" : ", ").append(text);
  }
  fail(all.insert(0, " must be one of ").insert(0, name).append(", not ").append(word));
}

}  // namespace millrace::bindings

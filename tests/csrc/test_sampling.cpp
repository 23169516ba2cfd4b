// Runs the sampler on tightly sized buffers, for the sanitizers to watch; values are checked from Python.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "millrace/philox.h"
#include "millrace/sampling.h"

namespace {

using millrace::Isa;
using millrace::SamplingStatus;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int32_t kPoison = -77;

static_assert(millrace::philox4x32({0, 0, 0, 0}, {0, 0})[0] == 0x6627E8D5);

void expect(bool condition, const char* what, std::int32_t vocab, Isa isa) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (vocabulary %d, %s)\n", what, vocab, millrace::name(isa).c_str());
  std::exit(1);
}

// Rows of one vocabulary size, each with other parameters; the arrays own exactly what the sampler may touch.
struct Case {
  std::int32_t rows = 24;
  std::int32_t vocab;
  std::int32_t width = 5;
  std::vector<float> logits, temperature, top_p, min_p, presence, frequency, repetition, bias_values;
  std::vector<std::int32_t> top_k, choice, position, top_n, bias_offsets{0}, bias_ids, history_offsets{0}, history_ids,
      prompt_lens;
  std::vector<std::uint64_t> seed;
  std::vector<std::uint32_t> mask_words;
  std::vector<const std::uint32_t*> masks;

  Case(std::int32_t vocab_size, std::mt19937& random) : vocab(vocab_size) {
    const auto below = [&random](std::int32_t n) {
      return static_cast<std::int32_t>(random() % static_cast<unsigned>(n));
    };
    std::normal_distribution<float> normal(0, 3);
    for (std::int32_t i = 0; i < rows * vocab; ++i) logits.push_back(below(9) == 0 ? -1e30F : normal(random));
    mask_words.assign(static_cast<std::size_t>((vocab + 31) / 32), 0x5555'5555U);
    for (std::int32_t row = 0; row < rows; ++row) {
      const auto pick = [row](auto... values) {
        const float list[] = {values...};
        return list[static_cast<std::size_t>(row) % sizeof...(values)];
      };
      temperature.push_back(pick(0.0F, 1.0F, 0.1F, 2.0F, 1e-42F));
      top_p.push_back(pick(1.0F, 0.9F, 1e-9F));
      min_p.push_back(pick(0.0F, 0.0F, 0.0F, 0.05F, 1.0F));
      presence.push_back(pick(0.0F, 1.5F));
      frequency.push_back(pick(0.0F, 0.0F, -2.0F));
      repetition.push_back(pick(1.0F, 1.3F, 0.01F));
      top_k.push_back(row % 4 == 0 ? 0 : 1 + below(vocab + 1));
      top_n.push_back(below(width + 2) - 1);
      seed.push_back(random());
      choice.push_back(row % 3);
      position.push_back(std::numeric_limits<std::int32_t>::max() - row);
      prompt_lens.push_back(4);
      for (int i = 0; i < 9; ++i) history_ids.push_back(i % 2 == 0 ? vocab - 1 : below(vocab));
      history_offsets.push_back(static_cast<std::int32_t>(history_ids.size()));
      for (int i = 0; i < row % 3; ++i) {
        bias_ids.push_back(below(vocab));
        bias_values.push_back(-100);
      }
      bias_offsets.push_back(static_cast<std::int32_t>(bias_ids.size()));
      masks.push_back(row % 5 == 0 ? mask_words.data() : nullptr);
    }
    at(1, vocab - 1) = std::numeric_limits<float>::quiet_NaN();
    at(2, 0) = kInfinity;
    for (std::int32_t i = 0; i < vocab; ++i) at(3, i) = -kInfinity;
  }

  float& at(std::int32_t row, std::int32_t token) { return logits[static_cast<std::size_t>(row * vocab + token)]; }

  millrace::SamplingInput input() const {
    return {logits.data(),
            vocab,
            rows,
            vocab,
            temperature.data(),
            top_p.data(),
            top_k.data(),
            min_p.data(),
            presence.data(),
            frequency.data(),
            repetition.data(),
            seed.data(),
            choice.data(),
            position.data(),
            top_n.data(),
            bias_offsets.data(),
            bias_ids.data(),
            bias_values.data(),
            history_offsets.data(),
            history_ids.data(),
            prompt_lens.data(),
            masks.data()};
  }
};

struct Result {
  std::vector<std::int32_t> tokens, top_ids;
  std::vector<float> logprobs, top_logprobs;
  std::vector<SamplingStatus> status;

  explicit Result(const Case& c)
      : tokens(static_cast<std::size_t>(c.rows), kPoison),
        top_ids(static_cast<std::size_t>(c.rows * c.width), kPoison),
        logprobs(static_cast<std::size_t>(c.rows), kPoison),
        top_logprobs(static_cast<std::size_t>(c.rows * c.width), kPoison),
        status(static_cast<std::size_t>(c.rows)) {}

  Result(const Case& c, Isa isa) : Result(c) { sample(c, isa, 0, c.rows); }

  void sample(const Case& c, Isa isa, std::int32_t first_row, std::int32_t last_row) {
    millrace::sample(c.input(),
                     {tokens.data(), logprobs.data(), status.data(), c.width, top_ids.data(), top_logprobs.data()}, isa,
                     first_row, last_row);
  }
};

void check(const Case& c, const Result& result, Isa isa) {
  for (std::int32_t row = 0; row < c.rows; ++row) {
    const auto r = static_cast<std::size_t>(row);
    const bool ok = result.status[r] == SamplingStatus::ok;
    expect(result.tokens[r] >= (ok ? 0 : -1) && result.tokens[r] < (ok ? c.vocab : 0), "a token", c.vocab, isa);
    expect(std::isnan(result.logprobs[r]) == !(ok && c.top_n[r] >= 0), "a logprob where asked for", c.vocab, isa);
    const std::int32_t asked = std::min(std::max(c.top_n[r], 0), c.vocab);
    for (std::int32_t i = 0; i < c.width; ++i) {
      const std::int32_t id = result.top_ids[r * static_cast<std::size_t>(c.width) + static_cast<std::size_t>(i)];
      const bool written = ok ? id >= 0 && id < c.vocab : true;
      expect(i < asked ? written : id == kPoison, "top entries where asked for, poison elsewhere", c.vocab, isa);
    }
  }
  expect(result.status[1] == SamplingStatus::not_finite, "NaN is an error", c.vocab, isa);
  expect(result.status[2] == SamplingStatus::not_finite, "infinity is an error", c.vocab, isa);
  expect(result.status[3] == SamplingStatus::no_token, "no token is an error", c.vocab, isa);
}

// Any range of rows, by any thread, writes those rows alone and writes what all at once would.
void check_ranges(const Case& c, const Result& whole, Isa isa) {
  const std::int32_t middle = c.rows / 3;
  Result parts(c);
  parts.sample(c, isa, middle, middle);
  expect(parts.tokens == std::vector<std::int32_t>(parts.tokens.size(), kPoison), "no rows", c.vocab, isa);
  std::thread([&] { parts.sample(c, isa, middle, c.rows); }).join();
  for (std::int32_t row = 0; row < c.rows; ++row) {
    const bool written = parts.tokens[static_cast<std::size_t>(row)] != kPoison;
    expect(written == (row >= middle), "rows of the range alone", c.vocab, isa);
  }
  parts.sample(c, isa, 0, middle);
  expect(parts.tokens == whole.tokens && parts.top_ids == whole.top_ids && parts.status == whole.status,
         "ranges equal the whole", c.vocab, isa);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const std::int32_t vocab : {1, 2, 7, 31, 33, 127, 128, 129, 1000, 8192, 20'011}) {
    const Case c(vocab, random);
    const Result baseline(c, Isa::baseline);
    for (const Isa isa : millrace::available_isas()) {
      const Result result(c, isa);
      check(c, result, isa);
      check_ranges(c, result, isa);
      expect(result.tokens == baseline.tokens && result.top_ids == baseline.top_ids, "equal to the baseline", vocab,
             isa);
    }
  }
}

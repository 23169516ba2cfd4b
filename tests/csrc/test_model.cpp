// Whole steps of small random models on every instruction set: what the sanitizers watch, and what must be equal to
// the last bit: a row alone, among others and in pieces, on one thread and on three.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "expect.h"
#include "millrace/isa.h"
#include "runtime/model.h"

using namespace millrace;

namespace {

constexpr std::int32_t kVocab = 77, kHidden = 96, kHeads = 6, kKVHeads = 2, kDim = 24, kMLP = 90, kLength = 70;
constexpr std::int32_t kTableWidth = 3;  // blocks of one row

struct Random {
  std::uint64_t state = 1;
  std::uint32_t next() {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::uint32_t>(state >> 33);
  }
};

struct Recipe {
  Precision precision;
  KVType kv;
  bool encoder;
};

// Numbers that live as long as the loading of a model.
class Source {
 public:
  Tensor matrix(std::int32_t rows, std::int32_t columns) { return make(rows, columns, 0.2F, 0.0F); }
  Tensor vector(std::int32_t size) { return make(1, size, 0.2F, 1.0F); }

 private:
  Tensor make(std::int32_t rows, std::int32_t columns, float range, float middle) {
    std::vector<float> values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
    for (float& value : values) {
      value = middle + range * (static_cast<float>(random_.next() % 2001) / 1000.0F - 1.0F);
    }
    kept_.push_back(std::move(values));
    return {reinterpret_cast<const std::byte*>(kept_.back().data()), Stored::float32, rows, columns};
  }

  Random random_;
  std::vector<std::vector<float>> kept_;
};

Layer make_layer(Weights& weights, Source& source, const Recipe& recipe) {
  const auto linear = [&](std::vector<Tensor> tensors, Order order = Order::joined) {
    return Linear{weights.pack(tensors, order, recipe.precision), nullptr};
  };
  const auto norm = [&](std::int32_t size) {
    const float* bias = recipe.encoder ? weights.vector({source.vector(size)}) : nullptr;
    return Norm{recipe.encoder, 1e-5F, weights.vector({source.vector(size)}), bias};
  };
  Layer layer;
  layer.post_norm = recipe.encoder;
  layer.attention_norm = norm(kHidden);
  layer.mlp_norm = norm(kHidden);
  if (!recipe.encoder) layer.q_norm = norm(kDim);
  layer.heads = kHeads;
  layer.kv_heads = kKVHeads;
  layer.head_dim = kDim;
  layer.scale = 0.2F;
  layer.rotary = recipe.encoder ? -1 : 0;
  layer.causal = !recipe.encoder;
  layer.window = recipe.encoder ? 0 : 50;
  layer.qkv = linear({source.matrix(layer.q_size(), kHidden), source.matrix(layer.kv_size(), kHidden),
                      source.matrix(layer.kv_size(), kHidden)});
  layer.qkv.bias = weights.vector({source.vector(layer.qkv_size())});
  layer.o = linear({source.matrix(kHidden, layer.q_size())});
  layer.gated = !recipe.encoder;
  layer.activation = recipe.encoder ? Activation::gelu : Activation::silu;
  layer.mlp_size = kMLP;
  layer.up = recipe.encoder ? linear({source.matrix(kMLP, kHidden)})
                            : linear({source.matrix(kMLP, kHidden), source.matrix(kMLP, kHidden)}, Order::interleaved);
  layer.down = linear({source.matrix(kHidden, kMLP)});
  return layer;
}

std::unique_ptr<Model> make_model(const Recipe& recipe, int threads, Isa isa) {
  auto pool = std::make_shared<Pool>(threads);
  auto weights = std::make_unique<Weights>(std::size_t{8} << 20, *pool, isa);
  Source source;
  Network network;
  network.vocab = kVocab;
  network.hidden = kHidden;
  network.head = weights->pack({source.matrix(kVocab, kHidden)}, Order::joined, recipe.precision);
  network.pooling = recipe.encoder ? Pooling::mean : Pooling::last;
  network.normalize = recipe.encoder;
  network.final_norm = {false, 1e-5F, weights->vector({source.vector(kHidden)}), nullptr};
  if (!recipe.encoder) network.rotaries = {{kDim, 1.0F, weights->vector({source.vector(kDim / 2)})}};
  for (int i = 0; i < 2; ++i) network.layers.push_back(make_layer(*weights, source, recipe));
  return std::make_unique<Model>(std::move(network), std::move(weights), recipe.kv, 32, std::move(pool), isa);
}

// Rows of one step, and what it yields.
struct Step {
  std::vector<std::int32_t> ids, positions, slots, offsets{0}, contexts, tables, draws, pooled;

  // Tokens [begin, end) of a sequence that is kept from block `block` on.
  void add(const std::vector<std::int32_t>& sequence, std::int32_t begin, std::int32_t end, std::int32_t block) {
    for (std::int32_t i = begin; i < end; ++i) {
      draws.push_back(static_cast<std::int32_t>(ids.size()));
      ids.push_back(sequence[static_cast<std::size_t>(i)]);
      positions.push_back(i);
      slots.push_back(block * kBlockTokens + i);
    }
    pooled.push_back(static_cast<std::int32_t>(contexts.size()));
    offsets.push_back(static_cast<std::int32_t>(ids.size()));
    contexts.push_back(end);
    for (std::int32_t i = 0; i < kTableWidth; ++i) tables.push_back(block + i);
  }

  // Logits of every token of a decoder, vectors of every row of an encoder.
  std::vector<float> run(Model& model) const {
    const bool encoder = !model.network().causal();
    const auto size = [](const auto& values) { return static_cast<std::int32_t>(values.size()); };
    const StepInput input{size(contexts),  size(ids),
                          ids.data(),      positions.data(),
                          slots.data(),    offsets.data(),
                          contexts.data(), tables.data(),
                          kTableWidth,     encoder ? 0 : size(draws),
                          draws.data(),    encoder ? size(pooled) : 0,
                          pooled.data(),   0,
                          nullptr,         nullptr};
    const std::size_t count = draws.size();
    const std::vector<float> zeros(count, 0), ones(count, 1);
    const std::vector<std::int32_t> nothing(count + 1, 0), no_logprobs(count, -1);
    const std::vector<std::uint64_t> seeds(count, 7);
    const std::vector<const std::uint32_t*> masks(count, nullptr);
    const SamplingInput sampling{nullptr,
                                 0,
                                 input.draws,
                                 kVocab,
                                 zeros.data(),
                                 ones.data(),
                                 nothing.data(),
                                 zeros.data(),
                                 zeros.data(),
                                 zeros.data(),
                                 ones.data(),
                                 seeds.data(),
                                 nothing.data(),
                                 nothing.data(),
                                 no_logprobs.data(),
                                 nothing.data(),
                                 nothing.data(),
                                 zeros.data(),
                                 nothing.data(),
                                 nothing.data(),
                                 nothing.data(),
                                 masks.data()};
    std::vector<std::int32_t> tokens(count);
    std::vector<float> logprobs(count);
    std::vector<SamplingStatus> status(count);
    const float* vectors =
        model.step(input, sampling, {tokens.data(), logprobs.data(), status.data(), 0, nullptr, nullptr});
    if (encoder) return {vectors, vectors + std::ptrdiff_t{input.pooled} * kHidden};
    check_greedy(model, tokens);
    return {model.logits(), model.logits() + std::ptrdiff_t{input.draws} * kVocab};
  }

 private:
  static void check_greedy(const Model& model, const std::vector<std::int32_t>& tokens) {
    for (std::size_t draw = 0; draw < tokens.size(); ++draw) {
      const float* row = model.logits() + draw * kVocab;
      for (std::int32_t i = 0; i < kVocab; ++i) expect(row[i] <= row[tokens[draw]], "the highest logit is drawn");
    }
  }
};

std::vector<std::int32_t> sequence(std::uint64_t seed, std::int32_t length) {
  Random random{seed};
  std::vector<std::int32_t> ids(static_cast<std::size_t>(length));
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random.next() % kVocab);
  return ids;
}

void expect_equal(const std::vector<float>& found, std::size_t at, const std::vector<float>& wanted,
                  const std::string& what) {
  expect(found.size() >= at + wanted.size(), what + ": as many numbers");
  expect(std::memcmp(found.data() + at, wanted.data(), wanted.size() * sizeof(float)) == 0, what);
}

void test_recipe(const Recipe& recipe, Isa isa, const std::string& label) {
  const std::vector<std::int32_t> ids = sequence(3, kLength);
  std::vector<float> wanted;
  for (const int threads : {1, 3}) {
    const std::unique_ptr<Model> model = make_model(recipe, threads, isa);
    Step alone;
    alone.add(ids, 0, kLength, 3);
    const std::vector<float> whole = alone.run(*model);
    if (wanted.empty()) wanted = whole;
    for (const float value : whole) expect(std::isfinite(value), label + ": finite");
    expect(whole[0] != whole[1], label + ": not all the same");
    expect_equal(whole, 0, wanted, label + ": threads");
    Step crowd;
    for (std::int32_t i = 0; i < 4; ++i)
      crowd.add(sequence(20 + static_cast<std::uint64_t>(i), 9 + 13 * i), 0, 9 + 13 * i, 12 + 3 * i);
    const std::size_t before = recipe.encoder ? 4 * kHidden : crowd.ids.size() * kVocab;
    crowd.add(ids, 0, kLength, 27);
    expect_equal(crowd.run(*model), before, wanted, label + ": among others");
    if (recipe.encoder) continue;
    for (std::int32_t begin = 0; begin < kLength; begin += 23) {
      Step piece;
      const std::int32_t end = begin + 23 < kLength ? begin + 23 : kLength;
      piece.add(ids, begin, end, 6);
      const auto first = wanted.begin() + std::ptrdiff_t{begin} * kVocab,
                 last = wanted.begin() + std::ptrdiff_t{end} * kVocab;
      expect_equal(piece.run(*model), 0, {first, last}, label + ": in pieces");
    }
  }
}

}  // namespace

int main() {
  std::vector<Isa> isas = available_isas();
  if (isas.back() >= Isa::avx512_bf16) isas.push_back(Isa::amx_emulated);
  for (const Isa isa : isas) {
    if (isa == Isa::baseline) continue;
    for (const bool encoder : {false, true}) {
      const std::string label = name(isa) + (encoder ? " encoder " : " decoder ");
      test_recipe({{Width::bf16, 0}, KVType::bf16, encoder}, isa, label + "bf16");
      test_recipe({{Width::int8, 0}, KVType::int8, encoder}, isa, label + "int8");
      test_recipe({{Width::int4, 32}, KVType::bf16, encoder}, isa, label + "int4");
    }
  }
}

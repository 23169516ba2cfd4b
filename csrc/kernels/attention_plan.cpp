#include "attention_plan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>

namespace millrace {
namespace {

// Items per thread, so that little is idle while the last ones run; tiles per thread below which they are split.
constexpr std::int64_t kItemsPerThread = 8, kTilesPerThread = 2;

template <typename T>
T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

AttentionTile make_tile(const AttentionInput& input, std::int32_t row, std::int32_t first, std::int32_t queries) {
  const std::int32_t group = input.heads / input.cache.kv_heads;
  const std::int32_t begin = visible(input, row, first / group).begin;
  const std::int32_t end = visible(input, row, (first + queries - 1) / group).end;
  // Keys and values take about as long to read as kTogether queries to meet them.
  const std::int64_t cost = std::int64_t{end - begin + kBlockTokens} * (queries + kTogether);
  return {row, first, queries, {begin / kSpan, ceil_div(end, kSpan)}, cost};
}

void make_tiles(const AttentionInput& input, std::vector<AttentionTile>& tiles) {
  const std::int32_t group = input.heads / input.cache.kv_heads;
  tiles.clear();
  for (std::int32_t row = 0; row < input.rows; ++row) {
    const std::int32_t queries = (input.offsets[row + 1] - input.offsets[row]) * group;
    if (queries == 0) continue;
    const std::int32_t size = ceil_div(queries, ceil_div(queries, kTileQueries));
    for (std::int32_t first = 0; first < queries; first += size) {
      tiles.push_back(make_tile(input, row, first, std::min(size, queries - first)));
    }
  }
}

// The longest first, by powers of two: in time linear in their number, neighbours staying together.
void sort_by_cost(std::vector<AttentionTile>& tiles, std::vector<AttentionTile>& sorted) {
  const auto bucket = [](const AttentionTile& tile) { return std::countl_zero(static_cast<std::uint64_t>(tile.cost)); };
  std::array<std::size_t, 66> begins{};
  for (const AttentionTile& tile : tiles) ++begins[static_cast<std::size_t>(bucket(tile)) + 1];
  for (std::size_t i = 1; i < begins.size(); ++i) begins[i] += begins[i - 1];
  sorted.resize(tiles.size());
  for (const AttentionTile& tile : tiles) sorted[begins[static_cast<std::size_t>(bucket(tile))]++] = tile;
  tiles.swap(sorted);
}

void add_whole(const AttentionTile& tile, std::int32_t kv_heads, std::int64_t item_cost, AttentionPlan::State& state) {
  const auto heads = static_cast<std::int32_t>(std::clamp<std::int64_t>(item_cost / tile.cost, 1, kv_heads));
  for (std::int32_t head = 0; head < kv_heads; head += heads) {
    const Range range{head, std::min(head + heads, kv_heads)};
    state.items.push_back({tile.row, range, tile.first_query, tile.queries, tile.spans, kWhole});
  }
}

// Returns where the next parts go.
std::int64_t add_split(const AttentionTile& tile, std::int32_t head, std::int32_t pieces, std::int64_t part,
                       std::int64_t span_floats, AttentionPlan::State& state) {
  const std::int32_t spans = tile.spans.end - tile.spans.begin;
  state.merges.push_back({tile.row, head, tile.first_query, tile.queries, spans, part});
  for (std::int32_t i = 0; i < pieces; ++i) {
    const Range range{tile.spans.begin + spans * i / pieces, tile.spans.begin + spans * (i + 1) / pieces};
    state.items.push_back({tile.row, {head, head + 1}, tile.first_query, tile.queries, range, part});
    part += (range.end - range.begin) * span_floats;
  }
  return part;
}

void add_items(const AttentionInput& input, std::int32_t threads, AttentionPlan::State& state) {
  const std::int32_t kv_heads = input.cache.kv_heads;
  std::int64_t cost = 0;
  for (const AttentionTile& tile : state.tiles) cost += tile.cost * kv_heads;
  const std::int64_t item_cost = cost / (threads * kItemsPerThread) + 1;
  const bool few = threads > 1 && static_cast<std::int64_t>(state.tiles.size()) * kv_heads < threads * kTilesPerThread;
  const std::int64_t piece_cost = few ? cost / (threads * kTilesPerThread) + 1 : cost + 1;
  std::int64_t part = 0;
  for (const AttentionTile& tile : state.tiles) {
    const std::int64_t spans = tile.spans.end - tile.spans.begin;
    const auto pieces = static_cast<std::int32_t>(std::min(spans, ceil_div(tile.cost, piece_cost)));
    if (pieces == 1) {
      add_whole(tile, kv_heads, item_cost, state);
      continue;
    }
    const std::int64_t span_floats = std::int64_t{tile.queries} * part_floats(input.cache.head_dim);
    for (std::int32_t head = 0; head < kv_heads; ++head) part = add_split(tile, head, pieces, part, span_floats, state);
  }
  if (state.parts.size() < static_cast<std::size_t>(part)) state.parts.resize(static_cast<std::size_t>(part));
}

}  // namespace

AttentionPlan::AttentionPlan() : state_(std::make_unique<State>()) {}
AttentionPlan::~AttentionPlan() = default;
AttentionPlan::AttentionPlan(AttentionPlan&&) noexcept = default;
AttentionPlan& AttentionPlan::operator=(AttentionPlan&&) noexcept = default;

void AttentionPlan::make(const AttentionInput& input, std::int32_t threads) {
  State& state = *state_;
  if (state.threads < threads) {
    state.scratch = std::make_unique_for_overwrite<AttentionScratch[]>(static_cast<std::size_t>(threads));
    state.threads = threads;
  }
  make_tiles(input, state.tiles);
  sort_by_cost(state.tiles, state.sorted);
  state.items.clear();
  state.merges.clear();
  add_items(input, threads, state);
}

std::int32_t AttentionPlan::items() const { return static_cast<std::int32_t>(state_->items.size()); }
std::int32_t AttentionPlan::merges() const { return static_cast<std::int32_t>(state_->merges.size()); }

}  // namespace millrace

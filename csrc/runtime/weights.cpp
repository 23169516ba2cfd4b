#include "runtime/weights.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "millrace/rows.h"

namespace millrace {
namespace {

constexpr std::int32_t kTurn = 16;  // channels of each tensor in turn, where they are interleaved
constexpr std::size_t kLine = 64;

// Where channel `channel` of the joined or interleaved tensors lies; null: nowhere.
const std::byte* channel_data(const std::vector<Tensor>& tensors, Order order, std::int32_t channel) {
  if (order == Order::interleaved) {
    const Tensor& tensor = tensors[static_cast<std::size_t>(channel / kTurn % 2)];
    const std::int32_t row = channel / (2 * kTurn) * kTurn + channel % kTurn;
    if (row >= tensor.rows) return nullptr;
    return tensor.data +
           static_cast<std::size_t>(row) * static_cast<std::size_t>(tensor.columns) * stored_bytes(tensor.stored);
  }
  for (const Tensor& tensor : tensors) {
    if (channel < tensor.rows) {
      return tensor.data +
             static_cast<std::size_t>(channel) * static_cast<std::size_t>(tensor.columns) * stored_bytes(tensor.stored);
    }
    channel -= tensor.rows;
  }
  return nullptr;
}

std::int32_t channels(const std::vector<Tensor>& tensors, Order order) {
  if (order == Order::interleaved) return (tensors[0].rows + kTurn - 1) / kTurn * 2 * kTurn;
  std::int32_t sum = 0;
  for (const Tensor& tensor : tensors) sum += tensor.rows;
  return sum;
}

bool finite(const float* values, std::int32_t count) {
  for (std::int32_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return false;
  }
  return true;
}

}  // namespace

std::size_t stored_bytes(Stored stored) { return stored == Stored::float32 ? 4 : 2; }

std::size_t Weights::packed(Precision precision, std::int32_t n, std::int32_t k) {
  const PackedBytes bytes = packed_bytes(precision.width, n, k, precision.group);
  return bytes.data + bytes.scales + bytes.zeros;
}

std::size_t Weights::plain(std::size_t count, std::size_t each) { return (count * each + kLine - 1) / kLine * kLine; }

PackedMatrix Weights::pack(const std::vector<Tensor>& tensors, Order order, Precision precision) {
  const std::int32_t n = channels(tensors, order), k = tensors[0].columns;
  check_shape(precision.width, n, k, precision.group);
  const PackedBytes bytes = packed_bytes(precision.width, n, k, precision.group);
  PackedMatrix matrix{precision.width, n, k, precision.group, arena_.array<std::byte>(bytes.data), nullptr, nullptr};
  if (bytes.scales > 0) matrix.scales = arena_.array<std::byte>(bytes.scales);
  if (bytes.zeros > 0) matrix.zeros = arena_.array<std::uint8_t>(bytes.zeros);
  std::atomic<bool> good{true};
  pool_.run([&](int thread) {
    pool_.share(thread, blocks(matrix), 4, [&](std::int64_t begin, std::int64_t end) {
      for (auto block = static_cast<std::int32_t>(begin); block < end; ++block) {
        const void* sources[kColumns];
        for (std::int32_t i = 0; i < kColumns; ++i) sources[i] = channel_data(tensors, order, block * kColumns + i);
        if (!pack_block(matrix, block, sources, tensors[0].stored, isa_)) good = false;
      }
    });
  });
  if (!good) throw std::domain_error("holds NaN or infinity");
  return matrix;
}

const float* Weights::vector(const std::vector<Tensor>& tensors, Order order) {
  std::vector<Tensor> columns = tensors;
  for (Tensor& tensor : columns) {  // a vector is a matrix of one column
    tensor.rows *= tensor.columns;
    tensor.columns = 1;
  }
  const std::int32_t count = channels(columns, order);
  auto* values = arena_.array<float>(static_cast<std::size_t>((count + kColumns - 1) / kColumns * kColumns));
  for (std::int32_t i = 0; i < count; ++i) {
    const std::byte* source = channel_data(columns, order, i);
    if (source != nullptr) embed_row(source, columns[0].stored, 1, false, values + i, isa_);
  }
  if (!finite(values, count)) throw std::domain_error("holds NaN or infinity");
  return values;
}

Table Weights::table(const Tensor& tensor) {
  const std::size_t row_bytes = static_cast<std::size_t>(tensor.columns) * stored_bytes(tensor.stored);
  auto* data = arena_.array<std::byte>(static_cast<std::size_t>(tensor.rows) * row_bytes);
  std::atomic<bool> good{true};
  pool_.run([&](int thread) {
    std::vector<float> row(static_cast<std::size_t>(tensor.columns));
    pool_.share(thread, tensor.rows, 64, [&](std::int64_t begin, std::int64_t end) {
      const std::size_t at = static_cast<std::size_t>(begin) * row_bytes;
      std::memcpy(data + at, tensor.data + at, static_cast<std::size_t>(end - begin) * row_bytes);
      for (std::int64_t i = begin; i < end; ++i) {
        embed_row(data + static_cast<std::size_t>(i) * row_bytes, tensor.stored, tensor.columns, false, row.data(),
                  isa_);
        if (!finite(row.data(), tensor.columns)) good = false;
      }
    });
  });
  if (!good) throw std::domain_error("holds NaN or infinity");
  return {data, tensor.stored, tensor.rows};
}

}  // namespace millrace

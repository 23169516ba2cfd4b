// Packs the tensors of a checkpoint, straight from where they are mapped, into one arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "millrace/matmul.h"
#include "runtime/arena.h"
#include "runtime/network.h"
#include "runtime/pool.h"

namespace millrace {

// A tensor where it lies: [rows][columns] contiguous numbers; a vector has one row.
struct Tensor {
  const std::byte* data = nullptr;
  Stored stored = Stored::float32;
  std::int32_t rows = 0;
  std::int32_t columns = 0;
};
std::size_t stored_bytes(Stored stored);  // of one number

struct Precision {
  Width width = Width::bf16;
  std::int32_t group = 0;
};

// How channels of several tensors become those of one matrix.
enum class Order {
  joined,       // one after the other
  interleaved,  // of two tensors: 16 of the first, 16 of the second, and so on
};

class Weights {
 public:
  // Room for `bytes`: what the `packed` and `plain` of everything add up to.
  Weights(std::size_t bytes, Pool& pool, Isa isa) : arena_(bytes), pool_(pool), isa_(isa) {}

  // Bytes that a matrix takes, or `count` plain numbers of `each` bytes.
  static std::size_t packed(Precision precision, std::int32_t n, std::int32_t k);
  static std::size_t plain(std::size_t count, std::size_t each = sizeof(float));

  // Throws std::domain_error where a number is not finite: `tensors` of the message is for the caller to name.
  PackedMatrix pack(const std::vector<Tensor>& tensors, Order order, Precision precision);
  const float* vector(const std::vector<Tensor>& tensors, Order order = Order::joined);
  Table table(const Tensor& tensor);

  std::size_t used() const { return arena_.used(); }
  const std::byte* data() const { return arena_.data(); }  // of all that is used

 private:
  Arena arena_;
  Pool& pool_;
  Isa isa_;
};

}  // namespace millrace

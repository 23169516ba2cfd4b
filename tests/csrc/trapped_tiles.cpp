#include "trapped_tiles.h"

#include <signal.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "tile_arithmetic.h"

namespace millrace::testing {
namespace {

constexpr int kRows = 16;
constexpr int kRowBytes = 64;

struct Tile {
  std::uint8_t bytes[kRows][kRowBytes];
};
struct Config {  // as in memory
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

Config config;
Tile tiles[8];
long count = 0;

[[noreturn]] void undefined() {
  signal(SIGILL, SIG_DFL);
  std::abort();
}

template <typename Number>
Number at(const Tile& tile, int row, int column) {
  Number number;
  std::memcpy(&number, &tile.bytes[row][column * static_cast<int>(sizeof number)], sizeof number);
  return number;
}

void require(bool condition) {
  if (!condition) undefined();
}

void require_product(int c, int a, int b) {
  require(c != a && a != b && c != b && config.palette == 1);
  require(config.rows[c] == config.rows[a] && config.row_bytes[c] == config.row_bytes[b]);
  require(config.row_bytes[a] == 4 * config.rows[b] && config.rows[a] > 0 && config.rows[b] > 0);
}

void multiply_bf16(int c, int a, int b) {
  require_product(c, a, b);
  for (int m = 0; m < config.rows[c]; ++m) {
    for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
      float sums[2] = {0, 0};
      for (int k = 0; k < config.rows[b]; ++k) {
        for (int i = 0; i < 2; ++i) {
          sums[i] = multiply_add(from_bf16(at<std::uint16_t>(tiles[a], m, 2 * k + i)),
                                 from_bf16(at<std::uint16_t>(tiles[b], k, 2 * n + i)), sums[i]);
        }
      }
      const float sum = add(at<float>(tiles[c], m, n), add(sums[0], sums[1]));
      std::memcpy(&tiles[c].bytes[m][n * 4], &sum, 4);
    }
  }
}

void multiply_signed_by_unsigned(int c, int a, int b) {
  require_product(c, a, b);
  for (int m = 0; m < config.rows[c]; ++m) {
    for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
      auto sum = at<std::int32_t>(tiles[c], m, n);
      for (int k = 0; k < config.rows[b]; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += at<std::int8_t>(tiles[a], m, 4 * k + i) * at<std::uint8_t>(tiles[b], k, 4 * n + i);
        }
      }
      std::memcpy(&tiles[c].bytes[m][n * 4], &sum, 4);
    }
  }
}

// The operand in memory: base + scaled index + displacement. Leaves `code` behind it.
struct Memory {
  std::uint64_t base, index;
};
Memory decode_memory(const std::uint8_t*& code, std::uint8_t vex, const greg_t* registers) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const auto value = [&](int number) { return static_cast<std::uint64_t>(registers[kOrder[number]]); };
  const int mod = *code >> 6;
  const int rm = *code++ & 7;
  Memory memory{0, 0};
  int base = rm;
  if (rm == 4) {
    const int sib = *code++;
    const int index = (sib >> 3 & 7) | ((vex & 0x40) == 0 ? 8 : 0);
    if (index != 4) memory.index = value(index) << (sib >> 6);
    base = sib & 7;
  }
  std::int32_t displacement = 0;
  if (mod == 1) displacement = static_cast<std::int8_t>(*code++);
  if (mod == 2 || (mod == 0 && base == 5)) {
    std::memcpy(&displacement, code, 4);
    code += 4;
  }
  if (mod != 0 || base != 5) {
    memory.base = value(base | ((vex & 0x20) == 0 ? 8 : 0));
  } else if (rm == 5) {
    memory.base = reinterpret_cast<std::uint64_t>(code);
  }
  memory.base += static_cast<std::uint64_t>(std::int64_t{displacement});
  return memory;
}

void move_rows(int t, const Memory& memory, bool store) {
  require(config.palette == 1 && config.rows[t] > 0);
  if (!store) tiles[t] = {};
  for (unsigned row = 0; row < config.rows[t]; ++row) {
    auto* address = reinterpret_cast<std::uint8_t*>(memory.base + row * memory.index);
    store ? std::memcpy(address, tiles[t].bytes[row], config.row_bytes[t])
          : std::memcpy(tiles[t].bytes[row], address, config.row_bytes[t]);
  }
}

// Carries out the instruction at `code`; where the next one begins, or null where it is none of the tiles'.
const std::uint8_t* carry_out(const std::uint8_t* code, const greg_t* registers) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return nullptr;
  enum { none, x66, xf3, xf2 };
  const std::uint8_t vex = code[1];
  const int prefix = code[2] & 3;
  const int third = ~(code[2] >> 3) & 15;
  const int opcode = code[3];
  const int modrm = code[4];
  const bool in_memory = modrm >> 6 != 3;
  const int t = modrm >> 3 & 7;
  code += 4;
  if (opcode == 0x49 && prefix == none && in_memory && t == 0) {
    std::memcpy(&config, reinterpret_cast<const void*>(decode_memory(code, vex, registers).base), sizeof config);
    std::memset(tiles, 0, sizeof tiles);
    return code;
  }
  if (opcode == 0x49 && prefix == none && modrm == 0xc0) {
    config = {};
    return code + 1;
  }
  if (opcode == 0x49 && prefix == xf2 && !in_memory) {
    require(config.palette == 1);
    tiles[t] = {};
    return code + 1;
  }
  if (opcode == 0x4b && prefix != none && in_memory) {
    move_rows(t, decode_memory(code, vex, registers), prefix == xf3);
    return code;
  }
  if (in_memory || prefix != xf3 || (opcode != 0x5c && opcode != 0x5e)) return nullptr;
  (opcode == 0x5c ? multiply_bf16 : multiply_signed_by_unsigned)(t, modrm & 7, third);
  return code + 1;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const std::uint8_t* next = carry_out(reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]), registers);
  if (next == nullptr) undefined();
  registers[REG_RIP] = reinterpret_cast<greg_t>(next);
  ++count;
}

}  // namespace

void trap_tiles() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGILL, &action, nullptr) != 0) std::abort();
}

long trapped_tiles() { return count; }

}  // namespace millrace::testing

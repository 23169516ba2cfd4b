#include "amx.h"

#include <cpuid.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>

namespace millrace {
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // the component of XCR0 that holds tiles; 17 holds their shapes
constexpr unsigned kTileState = 3U << 17;

// State of the one attempt under way: a handler can be given none.
struct sigaction previous;
pthread_t trying;
sigjmp_buf landing;

void on_illegal_instruction(int, siginfo_t*, void*) {
  if (pthread_equal(pthread_self(), trying) != 0) siglongjmp(landing, 1);
  sigaction(SIGILL, &previous, nullptr);  // not ours: returning meets the instruction again, with its own handler
}

// What the processor has, and what the operating system keeps when it switches threads.
bool processor_has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kNeeded = bit_AMX_TILE | bit_AMX_INT8 | bit_AMX_BF16;
  return (d & kNeeded) == kNeeded;
}

}  // namespace

bool survives(bool (*attempt)()) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  struct sigaction ours{};
  ours.sa_sigaction = on_illegal_instruction;
  ours.sa_flags = SA_SIGINFO;
  sigemptyset(&ours.sa_mask);
  trying = pthread_self();
  if (sigaction(SIGILL, &ours, &previous) != 0) return false;
  const bool result = sigsetjmp(landing, 1) == 0 && attempt();
  sigaction(SIGILL, &previous, nullptr);
  return result;
}

bool has_amx() {
  static const bool usable =
      processor_has_tiles() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && survives(tiles_multiply);
  return usable;
}

}  // namespace millrace

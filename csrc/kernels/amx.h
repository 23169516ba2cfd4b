// Whether this machine's tiles can be used.
#pragma once

namespace millrace {

// Asks the kernel for permission (arch_prctl(ARCH_REQ_XCOMP_PERM, 18), once per process, before any tile
// instruction) and tries one product of each kind; an instruction that is not there is a false, not a signal.
bool has_amx();

// What `attempt` returns, or false where it meets an illegal instruction. `attempt` must hold nothing that a jump out
// of it would leak. One caller at a time; an illegal instruction of another thread meanwhile is treated as it always
// is.
bool survives(bool (*attempt)());

// Whether tiles multiply bf16 and bytes as written down. For `survives`, with permission.
bool tiles_multiply();

}  // namespace millrace

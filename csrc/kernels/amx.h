// Whether this machine's tiles can be used.
#pragma once

namespace millrace {

// Asks the kernel for permission (arch_prctl(ARCH_REQ_XCOMP_PERM, 18), once per process, before any tile
// instruction) and tries one product of each kind; an instruction that is not there is a false, not a signal.
bool has_amx();

}  // namespace millrace

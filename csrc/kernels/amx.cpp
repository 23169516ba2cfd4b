#include "amx.h"

namespace millrace {

bool has_amx() { return false; }

}  // namespace millrace

// Tile instructions on a machine without them: each is an illegal instruction, whose signal carries it out as the
// manual defines it (Intel SDM volume 2) and goes on behind it. So what the compiler made of a kernel runs anywhere.
#pragma once

namespace millrace::testing {

// From here on, for the whole process. One thread may use tiles. Anything else illegal ends the process as ever.
void trap_tiles();

// Of those carried out so far.
long trapped_tiles();

}  // namespace millrace::testing

// In place of csrc/common/launch.cuh.
#pragma once

#include "common/stream.h"
#include "emulator.h"

namespace warploom {

template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, dim3 block, int shared_bytes, Stream, const Arguments& arguments) {
  emulator::run(grid, block, shared_bytes, [&] { kernel(arguments); });
}

// So few that blocks which share the rows of a small case walk down several.
inline int num_multiprocessors() { return 1; }

}  // namespace warploom

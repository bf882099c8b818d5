#include "common/parallel.h"

#include <omp.h>

#include <cstdlib>
#include <new>

namespace warploom {

int (*thread_count)() = omp_get_max_threads;

void run_blocks(int64_t blocks, void (*body)(void* context, int64_t block), void* context) {
  const int64_t threads = omp_in_parallel() ? 1 : thread_count();
  if (blocks < 2 || threads < 2) {
    for (int64_t block = 0; block < blocks; ++block) body(context, block);
    return;
  }
  // Dynamic, since causal attention's blocks differ in cost and cores may be shared with other processes.
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads < blocks ? threads : blocks))
  for (int64_t block = 0; block < blocks; ++block) body(context, block);
}

namespace {

struct Scratch {
  void* memory[kScratchSlots] = {};
  int64_t bytes[kScratchSlots] = {};

  ~Scratch() {
    for (void* block : memory) std::free(block);
  }
};

}  // namespace

void* scratch_bytes(int slot, int64_t bytes) {
  static thread_local Scratch mine;
  if (mine.bytes[slot] < bytes) {
    constexpr int64_t kAlignment = 64;
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    std::free(mine.memory[slot]);
    mine.memory[slot] = std::aligned_alloc(kAlignment, rounded);
    mine.bytes[slot] = mine.memory[slot] == nullptr ? 0 : rounded;
    if (mine.memory[slot] == nullptr) throw std::bad_alloc();
  }
  return mine.memory[slot];
}

}  // namespace warploom

// An arena for large blocks of memory. What is released is kept, joined with its free neighbours, and handed out again:
// a program that repeats its sizes in order, as training steps do, soon asks the system for nothing and takes no page
// faults. Pages are huge ones where the system offers them.
//
// Blocks are cut to size and not to size classes: in a step, activations are freed as gradients appear, and with
// classes the two could not share memory. Blocks of all sizes below kArenaLeastBytes would break up the large ones;
// they belong to malloc.
//
// All functions may be called from any thread, and in the child of a fork.
#pragma once

#include <cstdint>

namespace warploom {

constexpr int64_t kArenaLeastBytes = 64 << 10;

// At least `bytes` (more than 0) of uninitialised memory, aligned to a page, or null if the system has no more.
void* arena_allocate(int64_t bytes);

// Takes back what arena_allocate gave. False, and nothing happens, if the block is not the arena's.
bool arena_release(void* block);

// Returns all free memory to the system, and its size in bytes.
int64_t arena_give_back();

struct ArenaStatistics {
  int64_t blocks = 0;        // handed out and not released
  int64_t in_use_bytes = 0;  // theirs, in whole pages
  int64_t peak_bytes = 0;    // the most that was ever in use
  int64_t mapped_bytes = 0;  // in use or free
};
ArenaStatistics arena_statistics();

}  // namespace warploom

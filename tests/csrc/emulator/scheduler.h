// What races.cpp knows of the running thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace warploom::emulator {

struct Moment {
  uint32_t thread;       // in its block, counted from 1
  uint32_t block;        // in its grid, counted from 1
  uint32_t block_epoch;  // barriers of the block that it has passed
  uint32_t warp_epoch;   // barriers of its warp
};

// Null while no thread runs.
const Moment* now();
// Stacks and records of threads, which no other thread may reach.
bool is_private(const void* pointer);
// Offset into shared memory, negative if it is elsewhere.
ptrdiff_t shared_offset(const void* pointer);

// An access of the running thread. pending: an asynchronous write that begins; it is done with the next write.
void record_access(const void* pointer, size_t size, bool is_write, bool pending = false);
// Shared memory is that of the next block from here on; global memory that of the next launch.
void forget_shared();
void forget_accesses();

}  // namespace warploom::emulator

// parallel_for over OpenMP, and per-thread scratch memory that is kept between calls.
#pragma once

#include <cstdint>

namespace warploom {

// How many threads a loop may use. The bindings set it to torch's count, so that torch.set_num_threads holds here too.
extern int (*thread_count)();

void run_blocks(int64_t blocks, void (*body)(void* context, int64_t block), void* context);

// Calls body(block) for each block in [0, blocks), in any order and on any thread. For results that do not depend on
// the number of threads, cut the work into blocks by its own size, never by the number of threads, and combine what
// the blocks leave behind in a fixed order afterwards. Inside another parallel_for it runs serially.
template <class Body>
static inline void parallel_for(int64_t blocks, Body&& body) {
  run_blocks(blocks, [](void* context, int64_t block) { (*static_cast<decltype(&body)>(context))(block); }, &body);
}

constexpr int kScratchSlots = 8;

// At least `bytes` of uninitialised memory, aligned to 64 bytes, that belongs to the calling thread and this slot until
// the thread ends or asks for the slot again. Two pieces in use at once need two slots: a parallel_for body runs on the
// caller's thread too. So by convention slots 0 to 3 belong to code outside a parallel_for, 4 to 7 to bodies.
void* scratch_bytes(int slot, int64_t bytes);

template <class T>
static inline T* scratch(int slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace warploom

// Runs kernels of csrc/cuda on the CPU: the threads of a block are fibres that take turns at barriers, in a random
// order that a seed decides. The headers under tests/csrc/emulator replace those of csrc with the same path and names.
//
// What is found, each ends the process with a sentence: an access outside of shared or global memory
// (AddressSanitizer), two accesses of which one writes and between which no barrier is (races.cpp), a barrier that not
// all threads reach, an asynchronous copy that is read before it is waited for, an address that an instruction does not
// take, a load or store of 2 to 16 bytes at no multiple of its size, a grid that no card takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace warploom::emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned kMaxGridRest = 65535;    // blocks of a grid in its second and in its third dimension
constexpr int kMaxSharedBytes = 99 * 1024;  // of the smaller cards: a kernel that needs more would not run there
constexpr int kSlotBytes = 64;

// Calls the kernel in every thread of the grid, one block after another.
void run(dim3 grid, dim3 block, int shared_bytes, const std::function<void()>& kernel);

// Of the running thread.
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
unsigned char* shared_memory();

void block_barrier();
void warp_barrier();

// Every lane of the warp brings up to kSlotBytes, and gets what all brought: lane i's at [i * kSlotBytes]. Valid until
// the lane's next exchange. The lanes must come with the same instruction.
const unsigned char* exchange(const char* instruction, const void* mine, size_t size);

void copy_async(void* shared, const void* global, bool inside);
void commit_copies();
void wait_copies(int pending);

// Ends the process unless 16 bytes there are shared memory at a multiple of 16.
void require_shared_row(const char* instruction, const void* pointer);
// Counts how many more steps than one the card's banks take for these 8 rows of 16 bytes.
void count_bank_conflicts(const void* const (&rows)[8]);

// The lane's part of a product of which every lane brought its operands: four registers of a, two of b (PTX ISA,
// mma.m16n8k16). widen: from the bits of an element to its value.
void multiply_add(float (&acc)[4], const unsigned char* slots, int lane, float (*widen)(uint16_t));

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace warploom::emulator

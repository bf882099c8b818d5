#include "scheduler.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "emulator.h"

#ifndef __x86_64__
#error "the fibres are written for x86-64"
#endif

// Saves the registers that a call must keep on the stack and goes on with another stack.
asm(R"(
.text
.hidden warploom_switch_stacks
.globl warploom_switch_stacks
.type warploom_switch_stacks, @function
warploom_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size warploom_switch_stacks, .-warploom_switch_stacks
)");
extern "C" void warploom_switch_stacks(void** save, void* next);

namespace warploom::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  void* shared;
  const void* global;
  bool inside;
  int group;
};

struct Thread {
  void* stack_pointer;
  Moment moment;
  dim3 index;
  int warp, lane;
  bool done = false;
  const char* waits_for = nullptr;
  int parity = 0;  // which of its warp's slots the next exchange uses
  int group = 0;   // of copies, the one that is being gathered
  std::vector<Copy> copies;
};

struct Warp {
  int arrived = 0;
  const char* instruction = nullptr;
  unsigned char slots[2][kLanes * kSlotBytes];
};

struct Machine {
  unsigned char* stacks = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> runnable;
  int alive = 0, at_barrier = 0;
  dim3 grid, block, block_index;
  unsigned char* shared = nullptr;
  int shared_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  void* scheduler_stack = nullptr;
  Thread* running = nullptr;
  std::mt19937 random;
  long bank_conflicts = 0;

  Machine() {
    const char* seed = std::getenv("EMULATOR_SEED");
    random.seed(seed == nullptr ? 0 : std::atoi(seed));
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    stacks = static_cast<unsigned char*>(memory);
    threads.reserve(kMaxThreads);
  }
};

Machine& machine() {
  static Machine* const instance = new Machine;
  return *instance;
}

// Where the text of a thread begins.
extern "C" void warploom_thread_main() {
  Machine& m = machine();
  (*m.kernel)();
  Thread& self = *m.running;
  self.done = true;
  if (!self.copies.empty()) fail("thread %u ends with copies still on their way", self.moment.thread - 1);
  void* unused;
  warploom_switch_stacks(&unused, m.scheduler_stack);
  std::abort();
}

void wait(const char* what) {
  Machine& m = machine();
  Thread& self = *m.running;
  self.waits_for = what;
  warploom_switch_stacks(&self.stack_pointer, m.scheduler_stack);
}

void make_runnable(Thread& thread) {
  thread.waits_for = nullptr;
  machine().runnable.push_back(static_cast<int>(&thread - machine().threads.data()));
}

constexpr const char* kBlockBarrier = "block_barrier";

void open_barrier_if_complete() {
  Machine& m = machine();
  if (m.at_barrier == 0 || m.at_barrier < m.alive) return;
  m.at_barrier = 0;
  for (Thread& thread : m.threads) {
    if (thread.done) continue;
    ++thread.moment.block_epoch;
    make_runnable(thread);
  }
}

void start_threads(uint32_t block) {
  Machine& m = machine();
  const int count = static_cast<int>(m.block.x * m.block.y * m.block.z);
  m.threads.clear();
  m.warps.assign((count + kLanes - 1) / kLanes, Warp{});
  m.runnable.clear();
  m.alive = count;
  m.at_barrier = 0;
  for (int i = 0; i < count; ++i) {
    Thread thread;
    thread.moment = {static_cast<uint32_t>(i + 1), block, 0, 0};
    thread.index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y));
    thread.warp = i / kLanes;
    thread.lane = i % kLanes;
    auto* top = reinterpret_cast<void**>(m.stacks + (i + 1) * kStackBytes);
    *--top = nullptr;  // the return address of warploom_thread_main, so that its stack is aligned as after a call
    *--top = reinterpret_cast<void*>(&warploom_thread_main);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    thread.stack_pointer = top;
    m.threads.push_back(std::move(thread));
    m.runnable.push_back(i);
  }
}

void run_block() {
  Machine& m = machine();
  while (!m.runnable.empty()) {
    const size_t pick = m.random() % m.runnable.size();
    std::swap(m.runnable[pick], m.runnable.back());
    m.running = &m.threads[m.runnable.back()];
    m.runnable.pop_back();
    warploom_switch_stacks(&m.scheduler_stack, m.running->stack_pointer);
    if (m.running->done) {
      --m.alive;
      open_barrier_if_complete();
    }
    m.running = nullptr;
  }
  for (const Thread& thread : m.threads) {
    if (!thread.done) {
      fail("thread %u waits for ever at %s: not every thread comes there", thread.moment.thread - 1, thread.waits_for);
    }
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulator: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::fflush(nullptr);
  _exit(3);
}

void run(dim3 grid, dim3 block, int shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads) fail("a block of %u threads", threads);
  if (blocks == 0) fail("a grid without a block");
  if (grid.y > kMaxGridRest || grid.z > kMaxGridRest) fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  if (shared_bytes > kMaxSharedBytes) fail("%d bytes of shared memory, of %d", shared_bytes, kMaxSharedBytes);
  m.grid = grid;
  m.block = block;
  m.kernel = &kernel;
  m.shared_bytes = shared_bytes;
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (const uint32_t i : order) {
    // Anew for each block, and not a byte longer than asked: what lies behind is poisoned.
    if (shared_bytes > 0 && posix_memalign(reinterpret_cast<void**>(&m.shared), 128, shared_bytes) != 0) {
      throw std::bad_alloc();
    }
    if (shared_bytes > 0) std::memset(m.shared, 0xff, shared_bytes);  // NaN in every floating type
    m.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
    start_threads(i + 1);
    run_block();
    if (shared_bytes > 0) forget_shared();
    std::free(m.shared);
    m.shared = nullptr;
  }
  m.kernel = nullptr;
  forget_accesses();
}

const dim3& thread_index() { return machine().running->index; }
const dim3& block_index() { return machine().block_index; }
const dim3& block_size() { return machine().block; }
const dim3& grid_size() { return machine().grid; }
unsigned char* shared_memory() { return machine().shared; }

const Moment* now() {
  const Thread* running = machine().running;
  return running == nullptr ? nullptr : &running->moment;
}

bool is_private(const void* pointer) {
  const Machine& m = machine();
  const auto* byte = static_cast<const unsigned char*>(pointer);
  return byte >= m.stacks && byte < m.stacks + kStackBytes * kMaxThreads;
}

ptrdiff_t shared_offset(const void* pointer) {
  const Machine& m = machine();
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - m.shared;
  return m.shared != nullptr && offset >= 0 && offset < m.shared_bytes ? offset : -1;
}

void block_barrier() {
  Machine& m = machine();
  ++m.at_barrier;
  m.running->waits_for = kBlockBarrier;
  open_barrier_if_complete();
  // Opened or not, it goes on when it is picked.
  warploom_switch_stacks(&m.running->stack_pointer, m.scheduler_stack);
}

const unsigned char* exchange(const char* instruction, const void* mine, size_t size) {
  Machine& m = machine();
  Thread& self = *m.running;
  Warp& warp = m.warps[self.warp];
  if (size > kSlotBytes) fail("%s exchanges %zu bytes", instruction, size);
  if (warp.arrived > 0 && std::strcmp(warp.instruction, instruction) != 0) {
    fail("thread %u comes to %s while other lanes of its warp are at %s", self.moment.thread - 1, instruction,
         warp.instruction);
  }
  warp.instruction = instruction;
  unsigned char* const slots = warp.slots[self.parity];
  self.parity ^= 1;
  std::memcpy(slots + self.lane * kSlotBytes, mine, size);
  if (++warp.arrived < kLanes) {
    wait(instruction);
  } else {
    warp.arrived = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      Thread& other = m.threads[self.warp * kLanes + lane];
      if (&other != &self) make_runnable(other);
    }
  }
  return slots;
}

void warp_barrier() {
  exchange("warp_barrier", "", 0);
  ++machine().running->moment.warp_epoch;
}

void require_shared_row(const char* instruction, const void* pointer) {
  const ptrdiff_t offset = shared_offset(pointer);
  if (offset < 0 || offset + 16 > machine().shared_bytes) fail("%s: an address outside of shared memory", instruction);
  if (offset % 16 != 0) fail("%s: byte %td of shared memory is no multiple of 16", instruction, offset);
}

void count_bank_conflicts(const void* const (&rows)[8]) {
  int most = 0;
  for (int bank = 0; bank < 8; ++bank) {
    std::vector<ptrdiff_t> different;
    for (const void* row : rows) {
      const ptrdiff_t offset = shared_offset(row);
      bool is_new = offset / 16 % 8 == bank;
      for (const ptrdiff_t other : different) is_new = is_new && other != offset;
      if (is_new) different.push_back(offset);
    }
    most = std::max(most, static_cast<int>(different.size()));
  }
  machine().bank_conflicts += most - 1;
}

void multiply_add(float (&acc)[4], const unsigned char* slots, int lane, float (*widen)(uint16_t)) {
  // Element (row, k) of a is in lane 4 * (row % 8) + k % 8 / 2, register row / 8 + 2 * (k / 8), half k % 2; element
  // (k, column) of b in lane 4 * column + k % 8 / 2, register k / 8.
  const auto element = [&](int of_lane, int reg, int half) {
    uint16_t bits;
    std::memcpy(&bits, slots + of_lane * kSlotBytes + 4 * reg + 2 * half, sizeof(bits));
    return widen(bits);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      acc[i] += element(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2) *
                element(4 * column + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
}

void copy_async(void* shared, const void* global, bool inside) {
  Thread& self = *machine().running;
  require_shared_row("copy_async", shared);
  if (inside) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("copy_async: the source is no multiple of 16");
    record_access(global, 16, false);
  }
  record_access(shared, 16, true, true);
  self.copies.push_back({shared, global, inside, self.group});
}

void commit_copies() { ++machine().running->group; }

void wait_copies(int pending) {
  Thread& self = *machine().running;
  // As late as can be: what does not wait sees what was there before.
  std::vector<Copy> later;
  for (const Copy& copy : self.copies) {
    if (copy.group >= self.group - pending) {
      later.push_back(copy);
      continue;
    }
    record_access(copy.shared, 16, true);
    if (copy.inside) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
  }
  self.copies = std::move(later);
}

}  // namespace warploom::emulator

// For the test: since the last call.
extern "C" __attribute__((visibility("default"))) long emulator_bank_conflicts() {
  return std::exchange(warploom::emulator::machine().bank_conflicts, 0);
}

// Every access of instrumented code comes here instead of to AddressSanitizer's own functions: it is first checked for
// being inside of allocated memory, as there, and then against the accesses of other threads.
//
// Two accesses are in order if one thread makes both, if a barrier of their block lies between them, or one of their
// warp for two lanes of it. Two that are not in order and of which one writes are a race, whatever order they had here.
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "scheduler.h"

extern "C" {
void __asan_report_load_n(void* pointer, size_t size);
void __asan_report_store_n(void* pointer, size_t size);
}

namespace warploom::emulator {
namespace {

constexpr uint32_t kMany = ~0u;

// Of one byte: the last write, and the reads since the last barrier before the latest of them.
struct History {
  Moment write = {}, read = {};
  uint32_t read_warp = 0;
  bool pending = false;
};
struct Line {
  History bytes[16];
};

std::unordered_map<uintptr_t, Line>& lines() {
  static auto* const instance = new std::unordered_map<uintptr_t, Line>;
  return *instance;
}

// Of shared memory, by offset.
std::vector<History>& shared_bytes() {
  static auto* const instance = new std::vector<History>(kMaxSharedBytes);
  return *instance;
}

uint32_t warp_of(uint32_t thread) { return (thread - 1) / kLanes; }

bool is_before(const Moment& other, uint32_t other_warp, const Moment& self) {
  if (other.thread == 0) return true;
  if (other.block != self.block) return false;
  if (other.thread == self.thread || other.block_epoch < self.block_epoch) return true;
  return other_warp == warp_of(self.thread) && other.warp_epoch < self.warp_epoch;
}

void report(const void* pointer, const char* access, const char* other_access, uint32_t other) {
  const ptrdiff_t offset = shared_offset(pointer);
  char place[64], who[32];
  if (offset >= 0) {
    std::snprintf(place, sizeof(place), "byte %td of shared memory", offset);
  } else {
    std::snprintf(place, sizeof(place), "global memory");
  }
  if (other == kMany) {
    std::snprintf(who, sizeof(who), "others");
  } else {
    std::snprintf(who, sizeof(who), "thread %u", other - 1);
  }
  fail("race: thread %u %s %s that %s %s, with no barrier between", now()->thread - 1, access, place, who,
       other_access);
}

void record_byte(History& byte, const void* pointer, const Moment& self, bool is_write, bool pending) {
  if (byte.pending && !(is_write && byte.write.thread == self.thread && byte.write.block == self.block && !pending)) {
    fail("thread %u %s byte %td of shared memory while a copy into it is on its way", self.thread - 1,
         is_write ? "writes" : "reads", shared_offset(pointer));
  }
  if (!is_before(byte.write, byte.write.thread == 0 ? 0 : warp_of(byte.write.thread), self)) {
    report(pointer, is_write ? "writes" : "reads", "wrote", byte.write.thread);
  }
  if (is_write) {
    if (!is_before(byte.read, byte.read_warp, self)) report(pointer, "writes", "read", byte.read.thread);
    byte.write = self;
    byte.pending = pending;
    byte.read = {};
    return;
  }
  if (byte.read.thread == 0 || is_before(byte.read, byte.read_warp, self)) {
    byte.read = self;
    byte.read_warp = warp_of(self.thread);
    return;
  }
  if (byte.read.block != self.block) byte.read.block = kMany;
  if (byte.read.thread != self.thread) byte.read.thread = kMany;
  if (byte.read_warp != warp_of(self.thread)) byte.read_warp = kMany;
  byte.read.block_epoch = std::max(byte.read.block_epoch, self.block_epoch);
  byte.read.warp_epoch = std::max(byte.read.warp_epoch, self.warp_epoch);
}

void check_and_record(void* pointer, size_t size, bool is_write) {
  if (__asan_region_is_poisoned(pointer, size) != nullptr) {
    (is_write ? __asan_report_store_n : __asan_report_load_n)(pointer, size);
  }
  if (now() != nullptr) record_access(pointer, size, is_write);
}

// Of what one instruction reads or writes. A GPU ends the kernel where the CPU is only slower.
void check_alignment(const void* pointer, size_t size) {
  if (now() != nullptr && !is_private(pointer) && reinterpret_cast<uintptr_t>(pointer) % size != 0) {
    fail("thread %u reads or writes %zu bytes at no multiple of %zu", now()->thread - 1, size, size);
  }
}

}  // namespace

void record_access(const void* pointer, size_t size, bool is_write, bool pending) {
  if (is_private(pointer)) return;
  if (__asan_region_is_poisoned(const_cast<void*>(pointer), size) != nullptr) {
    (is_write ? __asan_report_store_n : __asan_report_load_n)(const_cast<void*>(pointer), size);
  }
  const Moment& self = *now();
  const ptrdiff_t offset = shared_offset(pointer);
  if (offset >= 0) {
    History* const bytes = shared_bytes().data() + offset;
    for (size_t i = 0; i < size; ++i) {
      record_byte(bytes[i], static_cast<const char*>(pointer) + i, self, is_write, pending);
    }
    return;
  }
  const auto first = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t byte = first; byte < first + size;) {
    Line& line = lines()[byte / 16];
    do {
      record_byte(line.bytes[byte % 16], reinterpret_cast<const void*>(byte), self, is_write, pending);
      ++byte;
    } while (byte % 16 != 0 && byte < first + size);
  }
}

void forget_shared() { std::fill(shared_bytes().begin(), shared_bytes().end(), History{}); }

void forget_accesses() { lines().clear(); }

}  // namespace warploom::emulator

#define WARPLOOM_INTERCEPT(size)                                                            \
  extern "C" __attribute__((visibility("hidden"))) void __asan_load##size(void* pointer) {  \
    warploom::emulator::check_alignment(pointer, size);                                     \
    warploom::emulator::check_and_record(pointer, size, false);                             \
  }                                                                                         \
  extern "C" __attribute__((visibility("hidden"))) void __asan_store##size(void* pointer) { \
    warploom::emulator::check_alignment(pointer, size);                                     \
    warploom::emulator::check_and_record(pointer, size, true);                              \
  }
WARPLOOM_INTERCEPT(1)
WARPLOOM_INTERCEPT(2)
WARPLOOM_INTERCEPT(4)
WARPLOOM_INTERCEPT(8)
WARPLOOM_INTERCEPT(16)

extern "C" __attribute__((visibility("hidden"))) void __asan_loadN(void* pointer, size_t size) {
  warploom::emulator::check_and_record(pointer, size, false);
}
extern "C" __attribute__((visibility("hidden"))) void __asan_storeN(void* pointer, size_t size) {
  warploom::emulator::check_and_record(pointer, size, true);
}

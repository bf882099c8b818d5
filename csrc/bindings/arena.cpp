// The arena as torch's CPU allocator, for large tensors; small ones stay with torch's own way, which is malloc.
#include "common/arena.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

void release(void* block) {
  if (block == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(block);
  if (!arena_release(block)) c10::free_cpu(block);
}

class ArenaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = nullptr;
    if (static_cast<int64_t>(bytes) >= kArenaLeastBytes) block = arena_allocate(static_cast<int64_t>(bytes));
    if (block == nullptr) block = small_or_refused(bytes);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  // What the system refused to the arena is torch's to refuse, in torch's words.
  static void* small_or_refused(size_t bytes) {
    try {
      return c10::alloc_cpu(bytes);
    } catch (const c10::Error&) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      throw;
    }
  }
};

// Neither is destroyed or forgotten: tensors keep a pointer to the allocator they are of.
ArenaAllocator& allocator() {
  static auto* const only = new ArenaAllocator;
  return *only;
}
c10::Allocator* before_install = nullptr;

bool installed() { return c10::GetCPUAllocator() == &allocator(); }

// False if another allocator was set with a priority that does not yield.
bool install() {
  if (installed()) return true;
  before_install = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator());
  return installed();
}

void uninstall() {
  if (installed()) c10::SetCPUAllocator(before_install);
}

c10::Dict<std::string, int64_t> statistics() {
  const ArenaStatistics now = arena_statistics();
  c10::Dict<std::string, int64_t> named;
  named.insert("blocks", now.blocks);
  named.insert("in_use_bytes", now.in_use_bytes);
  named.insert("peak_bytes", now.peak_bytes);
  named.insert("mapped_bytes", now.mapped_bytes);
  return named;
}

// Tensors allocated before an install or uninstall, of either allocator, stay valid and are freed as they were made.
TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def("arena_install() -> bool", install);
  m.def("arena_uninstall() -> ()", uninstall);
  m.def("arena_give_back() -> int", arena_give_back);
  m.def("arena_statistics() -> Dict(str, int)", statistics);
}

}  // namespace
}  // namespace warploom::bindings

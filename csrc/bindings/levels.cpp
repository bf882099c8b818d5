// Operators that say which instruction-set levels there are, and the hook that makes kernels keep torch's thread count.
#include "common/levels.h"

#include <ATen/Parallel.h>

#include "bindings/binding.h"
#include "common/parallel.h"

namespace warploom::bindings {
namespace {

// torch's own count and not OpenMP's: torch sets OpenMP's per thread, late, when a thread first asks.
[[maybe_unused]] const bool thread_count_is_torchs = [] {
  thread_count = at::get_num_threads;
  return true;
}();

std::string level() {
  try {
    return cpu::level_name();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def("level() -> str", level);
  m.def("levels() -> str[]", cpu::usable_levels);
  m.def("features() -> str[]", cpu::processor_features);
}

}  // namespace
}  // namespace warploom::bindings

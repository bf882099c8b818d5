#include "common/levels.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace warploom::cpu {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false, neon_bf16 = false;
  // Intel's cores that have AMX issue vdpbf16ps every other cycle, which is half the products of their two units for
  // multiply-add. Where a hypervisor hides AMX, float is faster: 1.5 times in a product of 4096 x 384 x 1536, 1.6 times
  // in a whole training step. Such cores are known by fp16 arithmetic, which is not hidden.
  bool slow_dot = false;
};

#if defined(__x86_64__)

// The register sets that the operating system saves on a context switch.
uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives tile registers (8 KiB per thread) only to processes that ask for them.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Features detect() {
  constexpr uint64_t kAvxStates = 0x6, kAvx512States = 0xe6, kTileStates = 0x60000;
  Features found;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool os_saves = c & bit_OSXSAVE, fma = c & bit_FMA, f16c = c & bit_F16C;
  if (!os_saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const uint64_t states = enabled_states();
  constexpr uint32_t kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // f, dq, bw, vl
  constexpr uint32_t kAmx = (1u << 22) | (1u << 24);                               // bf16, tile
  const bool has_avx512 = (b & kAvx512) == kAvx512, has_amx = (d & kAmx) == kAmx, has_fp16 = d & (1u << 23);
  uint32_t a1 = 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &b, &c, &d);
  found.avx2 = fma && f16c && (states & kAvxStates) == kAvxStates && __builtin_cpu_supports("avx2");
  found.avx512 = found.avx2 && has_avx512 && (states & kAvx512States) == kAvx512States;
  found.avx512_bf16 = found.avx512 && (a1 & (1u << 5));
  found.slow_dot = has_fp16 && __builtin_cpu_is("intel");
  found.amx = found.avx512_bf16 && has_amx && (states & kTileStates) == kTileStates && may_use_tiles();
  return found;
}

#elif defined(__aarch64__)

Features detect() {
  Features found;
  found.neon_bf16 = getauxval(AT_HWCAP2) & (1ul << 14);  // HWCAP2_BF16
  return found;
}

#else

Features detect() { return {}; }

#endif

struct Feature {
  const char* name;
  bool present;
};

const Features& found_features() {
  static const Features found = detect();
  return found;
}

std::vector<Feature> features() {
  const Features& found = found_features();
  return {{"avx2", found.avx2},
          {"avx512", found.avx512},
          {"avx512_bf16", found.avx512_bf16},
          {"amx", found.amx},
          {"neon_bf16", found.neon_bf16}};
}

bool can_run(const std::string& level) {
  if (level == "portable") return true;
  for (const Feature& feature : features()) {
    if (level == feature.name) return feature.present;
  }
  return false;
}

#define WARPLOOM_NAME_OF_LEVEL(level, Table, name) #level,
const std::vector<std::string>& built_levels() {
  static const std::vector<std::string> built = {WARPLOOM_EACH_LEVEL(WARPLOOM_NAME_OF_LEVEL, , )};
  return built;
}

int choose() {
  const auto& built = built_levels();
  const char* wanted = std::getenv("WARPLOOM_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') {
    int best = 0;
    for (size_t i = 0; i < built.size(); ++i) {
      const bool slower = built[i] == "avx512_bf16" && found_features().slow_dot;
      if (can_run(built[i]) && !slower) best = static_cast<int>(i);
    }
    return best;
  }
  std::string usable;
  for (size_t i = 0; i < built.size(); ++i) {
    if (!can_run(built[i])) continue;
    if (built[i] == wanted) return static_cast<int>(i);
    usable += (usable.empty() ? "" : ", ") + built[i];
  }
  throw std::invalid_argument(std::string("WARPLOOM_CPU_LEVEL is '") + wanted +
                              "', which this build or this processor does not have; usable here: " + usable);
}

}  // namespace

int level_index() {
  static const int index = choose();
  return index;
}

std::string level_name() { return built_levels()[level_index()]; }

std::vector<std::string> usable_levels() {
  std::vector<std::string> usable;
  for (const auto& level : built_levels()) {
    if (can_run(level)) usable.push_back(level);
  }
  return usable;
}

std::vector<std::string> processor_features() {
  std::vector<std::string> present;
  for (const Feature& feature : features()) {
    if (feature.present) present.push_back(feature.name);
  }
  return present;
}

}  // namespace warploom::cpu

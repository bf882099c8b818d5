// Instruction-set levels: which ones this library holds, which one this processor runs, and how an op picks its
// kernels.
//
// Every csrc/cpu/<op>.cpp is compiled once per level, with that level's compiler flags and WARPLOOM_LEVEL set to its
// name, and puts all its code into namespace warploom::cpu::WARPLOOM_LEVEL. It ends in one constant table of function
// pointers; WARPLOOM_DISPATCH in the op's header declares that table for each level and defines the accessor that
// picks. setup.py passes the levels it could compile, lowest first, as WARPLOOM_EACH_LEVEL, so no list is kept here.
//
// The trap this guards against: an inline function or template outside the level's namespace, std:: ones included,
// that a level file instantiates is merged by the linker with the same function of other files. The one copy it keeps
// may use AVX-512, and then portable code dies on an older processor. So a level file uses nothing from std:: but types
// and constants, gives its own functions internal linkage or the level's namespace, and has no static initialisation
// that runs code. tests/csrc/test_levels.py reads the object files and holds this.
#pragma once

#include <string>
#include <vector>

namespace warploom::cpu {

// The position in WARPLOOM_EACH_LEVEL of the level in use: the highest that this processor runs and that is not slower
// than one below, or the one named by the environment variable WARPLOOM_CPU_LEVEL. Throws std::invalid_argument if that
// one is unknown or cannot run here.
int level_index();

std::string level_name();
std::vector<std::string> usable_levels();       // built and able to run here, lowest first
std::vector<std::string> processor_features();  // those the levels ask for and this processor has

}  // namespace warploom::cpu

#define WARPLOOM_DECLARE_TABLE(level, Table, name) \
  namespace level {                                \
  extern const Table name;                         \
  }
#define WARPLOOM_ADDRESS_OF_TABLE(level, Table, name) &level::name,

// In namespace warploom::cpu: declares `const Table name` of each level, and `const Table& name()`.
#define WARPLOOM_DISPATCH(Table, name)                                                                  \
  WARPLOOM_EACH_LEVEL(WARPLOOM_DECLARE_TABLE, Table, name)                                              \
  [[maybe_unused]] static const Table& name() {                                                         \
    static const Table* const tables[] = {WARPLOOM_EACH_LEVEL(WARPLOOM_ADDRESS_OF_TABLE, Table, name)}; \
    return *tables[level_index()];                                                                      \
  }

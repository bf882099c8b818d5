#include "cpu/layer_norm.h"

#include "cpu/norm_rows.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

extern const NormTable layer_norm = norm_table<true>();

}  // namespace warploom::cpu::WARPLOOM_LEVEL

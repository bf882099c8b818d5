#include "cpu/rms_norm.h"

#include "cpu/norm_rows.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

extern const NormTable rms_norm = norm_table<false>();

}  // namespace warploom::cpu::WARPLOOM_LEVEL

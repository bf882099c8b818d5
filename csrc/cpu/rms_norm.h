// RMSNorm over the last dimension, forward and backward.
#pragma once

#include "common/levels.h"
#include "cpu/norm.h"

namespace warploom::cpu {

WARPLOOM_DISPATCH(NormTable, rms_norm)

}  // namespace warploom::cpu

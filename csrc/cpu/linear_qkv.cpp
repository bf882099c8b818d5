#include "cpu/linear_qkv.h"

#include "cpu/linear_gradients.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

template <class T>
constexpr LinearQkvKernels<T> kKernels = {{linears_bwd<T, T>}, {linears_bwd<T, float>}};
template <>
constexpr LinearQkvKernels<double> kKernels<double> = {{linears_bwd<double, double>}, {nullptr}};

}  // namespace

extern const LinearQkvTable linear_qkv = {kKernels<float>, kKernels<double>, kKernels<bf16>, kKernels<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL

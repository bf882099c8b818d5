#include "cpu/linear.h"

#include <type_traits>

#include "cpu/activation.h"
#include "cpu/few_rows.h"
#include "cpu/linear_gradients.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

template <class T>
int64_t packed_bytes(int64_t F, int64_t C) {
  return packed_elements<T>(F, C) * static_cast<int64_t>(sizeof(typename RightPanels<T>::Element));
}

template <class T, class W>
void pack(const W* weight, int64_t F, int64_t C, void* packed) {
  auto* panels = static_cast<typename RightPanels<T>::Element*>(packed);
  parallel_for((F + kRowsPerStrip - 1) / kRowsPerStrip, [&](int64_t strip) {
    const int64_t first = strip * kRowsPerStrip;
    pack_rows<T>(weight, F, C, first, smaller(first + kRowsPerStrip, F), panels);
  });
}

template <class T, class W>
RightPanels<T> forward_panels(const LinearForward<T, W>& args) {
  using Element = typename RightPanels<T>::Element;
  const int64_t F = args.F, C = args.C;
  if (args.packed != nullptr) return {static_cast<const Element*>(args.packed), F, C};
  Element* memory = scratch<Element>(0, RightPanels<T>::size(F, C));
  if (args.transposed) return pack_right_operand<T>(backward_operand(args.weight, C, F), memory);
  return pack_right_operand<T>(forward_operand(args.weight, F, C), memory);
}

template <class T, class W>
void linear_fwd(const LinearForward<T, W>& args) {
  if constexpr (std::is_floating_point_v<T>) {  // of 16-bit elements packing makes what the matrix units take
    if (args.M <= kFewRows && !args.transposed) return linear_fwd_of_few_rows(args);
  }
  const int64_t F = args.F;
  const Operand<T, /*kAlongK=*/true> x = {args.x, args.C, args.M, args.C};
  const RightPanels<T> weight = forward_panels(args);
  with_activation(args.activation, [&](auto activation) {
    gemm(x, weight, ResultRows<T>(args.y, args.M, F), [=](int64_t m, int64_t f, auto v, auto lanes) {
      if (args.bias != nullptr) v += load(args.bias + f, lanes);
      if (args.h != nullptr) store(args.h + m * F + f, v, lanes);
      return activation.value(v);
    });
  });
}

// dh = dy * activation'(saved), both (M, F).
template <class T>
const T* through_activation(const T* dy, const T* saved, Activation kind, int64_t count) {
  if (kind == Activation::kNone) return dy;
  constexpr int64_t kPerBlock = 1 << 14;
  T* dh = scratch<T>(1, count);
  with_activation(kind, [&](auto activation) {
    parallel_for((count + kPerBlock - 1) / kPerBlock, [&](int64_t block) {
      const int64_t from = block * kPerBlock, left = count - from;
      each_vector<typename VectorOf<T>::type>(left < kPerBlock ? left : kPerBlock, [&](int64_t i, auto n) {
        const auto slope = activation.slope(load(saved + from + i, n));
        store(dh + from + i, load(dy + from + i, n) * slope, n);
      });
    });
  });
  return dh;
}

template <class T, class W>
void linear_bwd(const LinearBackward<T, W>& args) {
  const T* dh = through_activation(args.dy, args.saved, args.activation, args.M * args.F);
  const typename LinearsBackward<T, W>::Layer layer = {dh,         args.weight, args.packed,    args.dweight,
                                                       args.dbias, args.F,      args.transposed};
  linears_bwd<T, W>({args.x, args.dx, &layer, 1, args.M, args.C});
}

template <class T, class W>
constexpr LinearKernelsOf<T, W> kKernelsOf = {linear_fwd<T, W>, linear_bwd<T, W>, pack<T, W>};
template <class T>
constexpr LinearKernels<T> kKernels = {kKernelsOf<T, T>, kKernelsOf<T, float>, packed_bytes<T>};
template <>
constexpr LinearKernels<double> kKernels<double> = {
    kKernelsOf<double, double>, {nullptr, nullptr, nullptr}, packed_bytes<double>};

}  // namespace

extern const LinearTable linear = {kKernels<float>, kKernels<double>, kKernels<bf16>, kKernels<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL

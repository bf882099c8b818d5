#include "cpu/linear_relu.h"

#include "cpu/gemm.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

template <class T>
static void linear_relu_fwd(const LinearReluForward<T>& args) {
  const Operand<T, /*kAlongK=*/true> x = {args.x, args.C, args.M, args.C};
  const Operand<T, /*kAlongK=*/true> weight = {args.weight, args.C, args.F, args.C};
  gemm(x, weight, [&](int64_t m, int64_t f, auto v, auto lanes) {
    if (args.bias != nullptr) v += load(args.bias + f, lanes);
    // max returns its second operand for NaN, and so keeps it.
    store(args.y + m * args.F + f, max(decltype(v){}, v), lanes);
  });
}

template <class T>
static void linear_relu_bwd(const LinearReluBackward<T>& args) {
  const int64_t M = args.M, C = args.C, F = args.F;
  const Operand<T, /*kAlongK=*/true, /*kRelu=*/true> dy_by_row = {args.dy, F, M, F, args.y};
  const Operand<T, /*kAlongK=*/false> weight_by_column = {args.weight, C, C, F};
  gemm(dy_by_row, weight_by_column,
       [&](int64_t m, int64_t c, auto v, auto lanes) { store(args.dx + m * C + c, v, lanes); });

  auto* dbias = scratch<typename Accumulator<T>::type>(1, F);
  const Operand<T, /*kAlongK=*/false, /*kRelu=*/true> dy_by_column = {args.dy, F, F, M, args.y};
  const Operand<T, /*kAlongK=*/false> x_by_column = {args.x, C, C, M};
  gemm(
      dy_by_column, x_by_column,
      [&](int64_t f, int64_t c, auto v, auto lanes) { store(args.dweight + f * C + c, v, lanes); }, dbias);
  each_vector<typename VectorOf<T>::type>(F, [&](int64_t f, auto n) { store(args.dbias + f, load(dbias + f, n), n); });
}

extern const LinearReluTable linear_relu = {{linear_relu_fwd<float>, linear_relu_bwd<float>},
                                            {linear_relu_fwd<double>, linear_relu_bwd<double>},
                                            {linear_relu_fwd<bf16>, linear_relu_bwd<bf16>},
                                            {linear_relu_fwd<fp16>, linear_relu_bwd<fp16>}};

}  // namespace warploom::cpu::WARPLOOM_LEVEL

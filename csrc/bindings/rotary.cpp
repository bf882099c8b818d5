#include "cpu/rotary.h"

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

Tensor turned(const Tensor& x_any, const Tensor& positions_any, double base, int64_t rotary_dim, int direction) {
  TORCH_CHECK_VALUE(x_any.dim() == 4, "x must be (B, H, T, D), got ", x_any.sizes());
  const int64_t B = x_any.size(0), H = x_any.size(1), T = x_any.size(2), D = x_any.size(3);
  TORCH_CHECK_VALUE(rotary_dim >= 0 && rotary_dim <= D && rotary_dim % 2 == 0, "rotary_dim must be even and in [0, ", D,
                    "], got ", rotary_dim);
  const bool each_row = positions_any.dim() == 2;
  const std::vector<int64_t> shape = each_row ? std::vector<int64_t>{B, T} : std::vector<int64_t>{T};
  TORCH_CHECK_VALUE(positions_any.sizes() == at::IntArrayRef(shape), "positions must be ", shape, ", got ",
                    positions_any.sizes());
  const Tensor positions = positions_any.to(at::kLong).contiguous();
  const Tensor x = D <= 1 || x_any.stride(3) == 1 ? x_any : x_any.contiguous();

  Tensor y = at::empty({B, T, H, D}, x.options());
  switch_dtype(x, [&](auto element) {
    using E = decltype(element);
    cpu::rotary().get(element).turn({data<E>(x), x.stride(0), x.stride(1), x.stride(2), data<int64_t>(positions),
                                     each_row, data<E>(y), B, H, T, D, rotary_dim, base, direction});
  });
  return y.transpose(1, 2);
}

Tensor rotary_fwd(const Tensor& x, const Tensor& positions, double base, int64_t rotary_dim) {
  return turned(x, positions, base, rotary_dim, 1);
}

Tensor rotary_bwd(const Tensor& dy, const Tensor& positions, double base, int64_t rotary_dim) {
  return turned(dy, positions, base, rotary_dim, -1);
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def("rotary_fwd(Tensor x, Tensor positions, float base, int rotary_dim) -> Tensor");
  m.def("rotary_bwd(Tensor dy, Tensor positions, float base, int rotary_dim) -> Tensor");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("rotary_fwd", rotary_fwd);
  m.impl("rotary_bwd", rotary_bwd);
}

}  // namespace
}  // namespace warploom::bindings

// The 16-bit element types as kernels see them: bits, without arithmetic. common/simd.h converts.
#pragma once

#include <cstdint>

namespace warploom {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// One instance of a kernel table per element type: PerDtype<Kernels> holds Kernels<float>, Kernels<bf16>, ...
template <template <class> class Kernels>
struct PerDtype {
  Kernels<float> of_float;
  Kernels<double> of_double;
  Kernels<bf16> of_bf16;
  Kernels<fp16> of_fp16;

  const Kernels<float>& get(float) const { return of_float; }
  const Kernels<double>& get(double) const { return of_double; }
  const Kernels<bf16>& get(bf16) const { return of_bf16; }
  const Kernels<fp16>& get(fp16) const { return of_fp16; }
};

// What sums over elements of type T, and statistics of them, are kept in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace warploom

// Neighbours in a row as floats: the unit in which kernels read and write global memory, mostly 16 bytes.
#pragma once

#include "common/ptx.cuh"

namespace warploom::cuda {

template <int bytes>
struct alignas(bytes) Bits {
  uint32_t words[bytes / 4];
};

// `size` consecutive elements of type T, kept as they are in memory.
template <class T, int size = 16 / sizeof(T)>
struct Vector {
  static constexpr int kSize = size, kBytes = size * sizeof(T);
  union {
    Bits<kBytes> bits;
    T elements[kSize];
  };

  __device__ Vector() : bits{} {}

  __device__ float operator[](int i) const { return ptx::to_float(elements[i]); }
  __device__ void set(int i, float value) { elements[i] = ptx::from_float<T>(value); }

  // The first `count` elements, zeros after them; none if count is not positive. aligned: the pointer is a multiple of
  // kBytes and count, where positive, at least kSize.
  __device__ void load(const T* pointer, int count, bool aligned) {
    bits = Bits<kBytes>{};
    if (aligned) {
      if (count > 0) bits = *reinterpret_cast<const Bits<kBytes>*>(pointer);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i < count) elements[i] = pointer[i];
      }
    }
  }

  __device__ void store(T* pointer, int count, bool aligned) const {
    if (aligned) {
      if (count > 0) *reinterpret_cast<Bits<kBytes>*>(pointer) = bits;
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i < count) pointer[i] = elements[i];
      }
    }
  }
};

// Null ones aside.
template <int bytes, class... Elements>
__host__ __device__ bool pointers_are_aligned(const Elements*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

// Whether every row of C elements begins at a multiple of 16 bytes in each of these arrays, null ones aside.
template <class T, class... Pointers>
__host__ __device__ bool rows_are_aligned(int64_t C, const Pointers*... arrays) {
  return C % Vector<T>::kSize == 0 && pointers_are_aligned<16>(arrays...);
}

}  // namespace warploom::cuda

// In place of csrc/common/ptx.cuh: the same functions, by what the PTX ISA says of the instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtypes.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::warploom::emulator::thread_index())
#define blockIdx (::warploom::emulator::block_index())
#define blockDim (::warploom::emulator::block_size())
#define gridDim (::warploom::emulator::grid_size())

// CUDA has these without a namespace.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace warploom::ptx {

constexpr int kWarp = emulator::kLanes;

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_memory());
}

inline void block_barrier() { emulator::block_barrier(); }
inline void warp_barrier() { emulator::warp_barrier(); }

inline int lane() {
  const dim3 &thread = threadIdx, &block = blockDim;
  return (thread.x + block.x * (thread.y + block.y * thread.z)) % kWarp;
}

// What lane `from` brought to an exchange.
template <class T>
T brought(const unsigned char* slots, int from) {
  T value;
  std::memcpy(&value, slots + from * emulator::kSlotBytes, sizeof(value));
  return value;
}

template <class T>
T shuffle_xor(T value, int mask) {
  return brought<T>(emulator::exchange("shuffle_xor", &value, sizeof(value)), lane() ^ mask);
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(fp16 value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof(half));
  return static_cast<float>(half);
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  const auto bits = bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float value) {
  const auto half = static_cast<_Float16>(value);
  fp16 result;
  std::memcpy(&result, &half, sizeof(result));
  return result;
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline float exp2_approx(float x) { return std::exp2(x); }

inline void copy_async(void* shared, const void* global, bool inside) { emulator::copy_async(shared, global, inside); }
inline void commit_copies() { emulator::commit_copies(); }
template <int pending>
void wait_copies() {
  emulator::wait_copies(pending);
}

// The rows' addresses, after the checks of those.
inline const unsigned char* matrix_rows(const char* instruction, const void* shared_row) {
  emulator::require_shared_row(instruction, shared_row);
  const unsigned char* slots = emulator::exchange(instruction, &shared_row, sizeof(shared_row));
  if (lane() % 8 == 0) {
    const void* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = brought<const void*>(slots, lane() + i);
    emulator::count_bank_conflicts(rows);
  }
  return slots;
}

inline void load_matrices(uint32_t (&registers)[4], const void* shared_row) {
  const unsigned char* slots = matrix_rows("load_matrices", shared_row);
  for (int j = 0; j < 4; ++j) {
    registers[j] = brought<const uint32_t*>(slots, 8 * j + lane() / 4)[lane() % 4];
  }
}

inline void load_matrices_transposed(uint32_t (&registers)[4], const void* shared_row) {
  const unsigned char* slots = matrix_rows("load_matrices_transposed", shared_row);
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = brought<const uint16_t*>(slots, 8 * j + 2 * (lane() % 4))[lane() / 4];
    const uint32_t high = brought<const uint16_t*>(slots, 8 * j + 2 * (lane() % 4) + 1)[lane() / 4];
    registers[j] = low | high << 16;
  }
}

template <class T>
void multiply_add(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* slots = emulator::exchange("multiply_add", mine, sizeof(mine));
  emulator::multiply_add(acc, slots, lane(), [](uint16_t bits) { return to_float(T{bits}); });
}

}  // namespace warploom::ptx

// Tiles of 16-bit matrices in shared memory, and the fragments of them that the matrix instructions take.
#pragma once

#include "common/ptx.cuh"

namespace warploom::cuda {

// (rows, columns), row by row. Where its 16-byte chunks stand is turned by the row's number, so that the eight rows
// that an instruction reads at one column lie in eight different groups of banks.
template <class T, int rows, int columns>
struct Tile {
  static_assert(sizeof(T) == 2 && columns % 64 == 0);
  static constexpr int kRows = rows, kColumns = columns, kBytes = rows * columns * 2;
  static constexpr int kChunk = 8;  // elements of 16 bytes

  unsigned char* base;

  __device__ void* chunk(int row, int column) const {
    return base + row * columns * 2 + ((column / kChunk) ^ (row % 8)) * 16;
  }

  // Begins to copy from `from`, of which (first_row, first_column) goes to (0, 0). Outside of (num_rows, num_columns)
  // are zeros. stride: elements from row to row, a multiple of 8, as num_columns is. Every thread of the block calls
  // it.
  template <int threads>
  __device__ void copy_from(const T* from, int64_t first_row, int64_t first_column, int64_t num_rows,
                            int64_t num_columns, int64_t stride, int thread) const {
    constexpr int kPerRow = columns / kChunk;
    static_assert(rows * kPerRow % threads == 0);
#pragma unroll
    for (int i = 0; i < rows * kPerRow / threads; ++i) {
      const int row = (i * threads + thread) / kPerRow, column = (i * threads + thread) % kPerRow * kChunk;
      const bool inside = first_row + row < num_rows && first_column + column < num_columns;
      ptx::copy_async(chunk(row, column), from + (inside ? (first_row + row) * stride + first_column + column : 0),
                      inside);
    }
  }
};

// Where this lane points to for four 8x8 matrices of a tile: they go down first, or across first.
template <class Tile>
__device__ const void* matrices_down(const Tile& tile, int row, int column, int lane) {
  return tile.chunk(row + lane % 16, column + lane / 16 * 8);
}
template <class Tile>
__device__ const void* matrices_across(const Tile& tile, int row, int column, int lane) {
  return tile.chunk(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8);
}

// a of multiply_add: 16 rows of the product from `m` on, 16 steps of its depth from `k` on. The tile holds (m, k).
template <class Tile>
__device__ void load_a(uint32_t (&a)[4], const Tile& tile, int m, int k, int lane) {
  ptx::load_matrices(a, matrices_down(tile, m, k, lane));
}
// The tile holds (k, m).
template <class Tile>
__device__ void load_a_transposed(uint32_t (&a)[4], const Tile& tile, int m, int k, int lane) {
  ptx::load_matrices_transposed(a, matrices_across(tile, k, m, lane));
}
// b of two multiply_adds: columns n to n + 7 in b[0] and b[1], those to n + 15 in b[2] and b[3]. The tile holds (n, k).
template <class Tile>
__device__ void load_b(uint32_t (&b)[4], const Tile& tile, int n, int k, int lane) {
  ptx::load_matrices(b, matrices_across(tile, n, k, lane));
}
// The tile holds (k, n).
template <class Tile>
__device__ void load_b_transposed(uint32_t (&b)[4], const Tile& tile, int n, int k, int lane) {
  ptx::load_matrices_transposed(b, matrices_down(tile, k, n, lane));
}

// The two elements of a register.
template <class T>
__device__ float low(uint32_t pair) {
  return ptx::to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
__device__ float high(uint32_t pair) {
  return ptx::to_float(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace warploom::cuda

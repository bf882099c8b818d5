// LayerNorm: a warp takes a narrow row, a block a wide one, and holds it in registers, so that it is read once. The
// sums for the weights' gradients stay in shared memory while a block walks down the rows; each block writes one
// partial sum, and a second kernel adds those up in a fixed order.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "cuda/layer_norm.h"
#include "cuda/vector.cuh"

namespace warploom::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / ptx::kWarp;
constexpr int kWarpsOfRows = 4;  // warps in a block where each takes a row
// Vectors of its row that a thread holds at most: more did not fit its registers in the backward kernel.
template <class T>
constexpr int kVectors = sizeof(T) == 4 ? 4 : 3;
template <class T>
constexpr int kElements = kVectors<T> * Vector<T>::kSize;
static_assert(max_norm_width<float>() == kElements<float> * kMaxThreads);
static_assert(max_norm_width<bf16>() == kElements<bf16> * kMaxThreads);

// threads of a row, rows of a block
template <class T>
dim3 block_for(int C) {
  if (C <= kElements<T> * ptx::kWarp) return dim3(ptx::kWarp, kWarpsOfRows);
  const int threads = (C / 16 + ptx::kWarp - 1) / ptx::kWarp * ptx::kWarp;
  return dim3(std::min(threads, kMaxThreads), 1);
}

struct Pair {
  float first, second;
};

// The sums over the threads of a row, for each of them. between: where the warps of a block meet, other memory than
// that of the sum before.
__device__ Pair row_sum(Pair value, Pair* between) {
#pragma unroll
  for (int mask = ptx::kWarp / 2; mask > 0; mask /= 2) {
    value.first += ptx::shuffle_xor(value.first, mask);
    value.second += ptx::shuffle_xor(value.second, mask);
  }
  if (blockDim.x == ptx::kWarp) return value;
  if (threadIdx.x % ptx::kWarp == 0) between[threadIdx.x / ptx::kWarp] = value;
  ptx::block_barrier();
  Pair sum = {0.0f, 0.0f};
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / ptx::kWarp; ++warp) {
    sum.first += between[warp].first;
    sum.second += between[warp].second;
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_fwd_kernel(const LayerNormFwd<T> a) {
  using V = Vector<T>;
  auto* between = ptx::shared_memory<Pair>();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.N) return;
  const int64_t first = row * a.C;
  const bool aligned = rows_are_aligned<T>(a.C, a.x, a.residual, a.weight, a.bias, a.y, a.stream);

  V held[kVectors<T>];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    const int column = (v * blockDim.x + threadIdx.x) * V::kSize, count = a.C - column;
    held[v].load(a.x + first + column, count, aligned);
    if (a.residual != nullptr) {
      V residual;
      residual.load(a.residual + first + column, count, aligned);
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) held[v].set(i, held[v][i] + residual[i]);
      held[v].store(a.stream + first + column, count, aligned);
    }
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) sum += held[v][i];
  }
  const float mean = row_sum({sum, 0.0f}, between).first / a.C;

  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    const int column = (v * blockDim.x + threadIdx.x) * V::kSize;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      const float distance = held[v][i] - mean;
      squares += column + i < a.C ? distance * distance : 0.0f;
    }
  }
  const float rstd = 1.0f / sqrtf(row_sum({squares, 0.0f}, between + kMaxWarps).first / a.C + a.eps);

#pragma unroll
  for (int v = 0; v < kVectors<T>; ++v) {
    const int column = (v * blockDim.x + threadIdx.x) * V::kSize, count = a.C - column;
    V weight, bias;
    weight.load(a.weight + column, count, aligned);
    if (a.bias != nullptr) bias.load(a.bias + column, count, aligned);
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) held[v].set(i, (held[v][i] - mean) * rstd * weight[i] + bias[i]);
    held[v].store(a.y + first + column, count, aligned);
  }
  if (threadIdx.x == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// What a thread adds up over rows, four columns at a time, so laid out that a warp's accesses lie side by side.
struct alignas(16) Quad {
  float values[4];
};

int quads_of_row(int C, int vector_size, int threads) {
  const int per_step = threads * vector_size;
  return (C + per_step - 1) / per_step * per_step / 4;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_bwd_kernel(const LayerNormBwd<T> a) {
  using V = Vector<T>;
  constexpr int kQuads = V::kSize / 4;
  auto* between = ptx::shared_memory<Pair>();  // two sets in turn: the other may still be read
  const int threads = blockDim.x, vectors = (a.C + threads * V::kSize - 1) / (threads * V::kSize);
  const int quads = vectors * kQuads * threads;
  // This thread's sums: quad q of vector v for dweight at [(v * kQuads + q) * threads], those for dbias `quads` behind.
  auto* sums = reinterpret_cast<Quad*>(between + 2 * kMaxWarps) + 2 * quads * threadIdx.y + threadIdx.x;
  for (int q = 0; q < vectors * kQuads; ++q) sums[q * threads] = sums[quads + q * threads] = Quad{};
  const bool aligned = rows_are_aligned<T>(a.C, a.dy, a.dstream, a.x, a.weight, a.dx);

  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int parity = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.N; row += step) {
    const int64_t first = row * a.C;
    const float mean = a.mean[row], rstd = a.rstd[row];
    V x[kVectors<T>], dy[kVectors<T>];
    Pair sum = {0.0f, 0.0f};  // of dx_hat, of dx_hat * x_hat
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      const int column = (v * threads + threadIdx.x) * V::kSize, count = a.C - column;
      x[v].load(a.x + first + column, count, aligned);
      dy[v].load(a.dy + first + column, count, aligned);
    }
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      const int column = (v * threads + threadIdx.x) * V::kSize, count = a.C - column;
      if (count <= 0) break;
      V weight;
      weight.load(a.weight + column, count, aligned);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        Quad* const of_weight = sums + (v * kQuads + q) * threads;
        Quad dweight = of_weight[0], dbias = of_weight[quads];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x_hat = (x[v][4 * q + i] - mean) * rstd, gradient = dy[v][4 * q + i];
          dweight.values[i] += gradient * x_hat;
          dbias.values[i] += gradient;
          sum.first += gradient * weight[4 * q + i];
          sum.second += gradient * weight[4 * q + i] * x_hat;
        }
        of_weight[0] = dweight;
        of_weight[quads] = dbias;
      }
    }
    sum = row_sum(sum, between + parity * kMaxWarps);
    parity ^= 1;
    const float shift = sum.first / a.C, slope = sum.second / a.C;
#pragma unroll
    for (int v = 0; v < kVectors<T>; ++v) {
      const int column = (v * threads + threadIdx.x) * V::kSize, count = a.C - column;
      if (count <= 0) break;
      V weight, dstream;
      weight.load(a.weight + column, count, aligned);
      if (a.dstream != nullptr) dstream.load(a.dstream + first + column, count, aligned);
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) {
        const float x_hat = (x[v][i] - mean) * rstd;
        dy[v].set(i, rstd * (dy[v][i] * weight[i] - shift - x_hat * slope) + dstream[i]);
      }
      dy[v].store(a.dx + first + column, count, aligned);
    }
  }

  // The rows of a block have the same columns at the same place.
  ptx::block_barrier();
  if (threadIdx.y != 0) return;
  float* const partial = a.partials + static_cast<int64_t>(blockIdx.x) * 2 * a.C;
  for (int q = 0; q < vectors * kQuads; ++q) {
    const int column = (q / kQuads * threads + threadIdx.x) * V::kSize + q % kQuads * 4;
    Quad dweight = {}, dbias = {};
    for (int other = 0; other < static_cast<int>(blockDim.y); ++other) {
      const Quad* const theirs = sums + 2 * quads * other + q * threads;
      for (int i = 0; i < 4; ++i) {
        dweight.values[i] += theirs[0].values[i];
        dbias.values[i] += theirs[quads].values[i];
      }
    }
    for (int i = 0; i < 4; ++i) {
      if (column + i >= a.C) break;
      partial[column + i] = dweight.values[i];
      partial[a.C + column + i] = dbias.values[i];
    }
  }
}

constexpr int kSumRows = 8;  // partials that a block adds up side by side, of 32 columns

template <class T>
__global__ void __launch_bounds__(kSumRows* ptx::kWarp) layer_norm_sums_kernel(const LayerNormBwd<T> a) {
  auto* between = ptx::shared_memory<float>();  // (kSumRows, 32)
  const int column = blockIdx.x * ptx::kWarp + threadIdx.x;
  float sum = 0.0f;
  if (column < 2 * a.C) {
    for (int p = threadIdx.y; p < a.num_partials; p += kSumRows) {
      sum += a.partials[static_cast<int64_t>(p) * 2 * a.C + column];
    }
  }
  between[threadIdx.y * ptx::kWarp + threadIdx.x] = sum;
  ptx::block_barrier();
  if (threadIdx.y != 0 || column >= 2 * a.C) return;
  sum = 0.0f;
  for (int row = 0; row < kSumRows; ++row) sum += between[row * ptx::kWarp + threadIdx.x];
  (column < a.C ? a.dweight[column] : a.dbias[column - a.C]) = ptx::from_float<T>(sum);
}

}  // namespace

template <class T>
int layer_norm_num_partials(int64_t N, int C) {
  const int rows = block_for<T>(C).y;
  // Four blocks a multiprocessor hide each other's loads.
  return static_cast<int>(std::min<int64_t>((N + rows - 1) / rows, 4 * num_multiprocessors()));
}

template <class T>
void launch_layer_norm_fwd(const LayerNormFwd<T>& a, Stream stream) {
  if (a.N == 0) return;
  const dim3 block = block_for<T>(a.C);
  const auto blocks = static_cast<unsigned>((a.N + block.y - 1) / block.y);
  launch(layer_norm_fwd_kernel<T>, dim3(blocks), block, 2 * kMaxWarps * sizeof(Pair), stream, a);
}

template <class T>
void launch_layer_norm_bwd(const LayerNormBwd<T>& a, Stream stream) {
  if (a.C == 0) return;
  const dim3 block = block_for<T>(a.C);
  const int sums_bytes = block.y * 2 * quads_of_row(a.C, Vector<T>::kSize, block.x) * static_cast<int>(sizeof(Quad));
  if (a.N != 0) {
    launch(layer_norm_bwd_kernel<T>, dim3(a.num_partials), block, 2 * kMaxWarps * sizeof(Pair) + sums_bytes, stream, a);
  }
  launch(layer_norm_sums_kernel<T>, dim3((2 * a.C + ptx::kWarp - 1) / ptx::kWarp), dim3(ptx::kWarp, kSumRows),
         kSumRows * ptx::kWarp * sizeof(float), stream, a);
}

template int layer_norm_num_partials<float>(int64_t, int);
template int layer_norm_num_partials<bf16>(int64_t, int);
template int layer_norm_num_partials<fp16>(int64_t, int);
template void launch_layer_norm_fwd(const LayerNormFwd<float>&, Stream);
template void launch_layer_norm_fwd(const LayerNormFwd<bf16>&, Stream);
template void launch_layer_norm_fwd(const LayerNormFwd<fp16>&, Stream);
template void launch_layer_norm_bwd(const LayerNormBwd<float>&, Stream);
template void launch_layer_norm_bwd(const LayerNormBwd<bf16>&, Stream);
template void launch_layer_norm_bwd(const LayerNormBwd<fp16>&, Stream);

}  // namespace warploom::cuda

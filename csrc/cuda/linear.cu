// The three products of a linear layer by one kernel: tiles of both operands are copied to shared memory while those
// before are multiplied. The ReLU and its mask are made from the accumulators; on the way back the mask is applied to
// the fragments of dy, so that dh is never in memory, and the bias gradient is summed from them.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "cuda/linear.h"
#include "cuda/tiles.cuh"
#include "cuda/vector.cuh"

namespace warploom::cuda {
namespace {

constexpr int kM = 128, kN = 128, kK = 64;  // of a block's tile
constexpr int kWarpM = 64, kWarpN = 32;     // of a warp's: one word of the mask wide
constexpr int kWarpsN = kN / kWarpN;
constexpr int kThreads = kM / kWarpM * kWarpsN * ptx::kWarp;
constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
constexpr int kMaskWords = kM * kK / 32;  // of a tile of dy
static_assert(kMaskWords == kThreads, "each thread brings one");

// The operands of the product (M, N) = sum over K, as they lie in memory.
template <class T, LinearProduct product>
struct Operands {
  static constexpr bool kATransposed = product == LinearProduct::kWeight;   // a holds (K, M)
  static constexpr bool kBTransposed = product != LinearProduct::kForward;  // b holds (K, N)
  using ATile = Tile<T, kATransposed ? kK : kM, kATransposed ? kM : kK>;
  using BTile = Tile<T, kBTransposed ? kK : kN, kBTransposed ? kN : kK>;
  static constexpr int kStageBytes = ATile::kBytes + BTile::kBytes + kMaskWords * 4;

  const T *a, *b;
  int64_t M, N, K;

  __device__ explicit Operands(const Linear<T>& l) {
    if constexpr (product == LinearProduct::kForward) {
      a = l.x, b = l.weight, M = l.N, N = l.F, K = l.C;
    } else if constexpr (product == LinearProduct::kInput) {
      a = l.dy, b = l.weight, M = l.N, N = l.C, K = l.F;
    } else {
      a = l.dy, b = l.x, M = l.F, N = l.C, K = l.N;
    }
  }
};

// Both halves of a pair of 16-bit elements, or zero, by two bits.
__device__ uint32_t select(uint32_t pair, uint32_t low_bit, uint32_t high_bit) {
  return pair & ((low_bit & 1 ? 0xffffu : 0u) | (high_bit & 1 ? 0xffff0000u : 0u));
}

template <class T, LinearProduct product>
__global__ void __launch_bounds__(kThreads) linear_product_kernel(const Linear<T> l) {
  using O = Operands<T, product>;
  using ATile = typename O::ATile;
  using BTile = typename O::BTile;
  constexpr bool kBackward = product != LinearProduct::kForward;
  const O operands(l);
  const int64_t M = operands.M, N = operands.N, K = operands.K;
  // Of tiles of rows there may be more than the second dimension of a grid holds blocks.
  const auto tiles_n = static_cast<unsigned>((N + kN - 1) / kN);
  const int64_t block_m = static_cast<int64_t>(blockIdx.x / tiles_n) * kM, block_n = blockIdx.x % tiles_n * kN;
  const int thread = threadIdx.x, lane = thread % ptx::kWarp, warp = thread / ptx::kWarp;
  const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;
  auto* const shared = ptx::shared_memory<unsigned char>();
  const int64_t words = (l.F + 127) / 128 * 4;  // mask_words, which is a function of the host
  const bool masked = kBackward && l.mask != nullptr;
  const bool sums_rows = product == LinearProduct::kWeight && l.dbias != nullptr && block_n == 0 && warp_n == 0;

  const auto a_tile = [&](int stage) { return ATile{shared + stage * O::kStageBytes}; };
  const auto b_tile = [&](int stage) { return BTile{shared + stage * O::kStageBytes + ATile::kBytes}; };
  const auto mask_tile = [&](int stage) {
    return reinterpret_cast<uint32_t*>(shared + stage * O::kStageBytes + ATile::kBytes + BTile::kBytes);
  };
  const auto copy_stage = [&](int64_t k, int stage) {
    if constexpr (O::kATransposed) {
      a_tile(stage).template copy_from<kThreads>(operands.a, k, block_m, K, M, M, thread);
    } else {
      a_tile(stage).template copy_from<kThreads>(operands.a, block_m, k, M, K, K, thread);
    }
    if constexpr (O::kBTransposed) {
      b_tile(stage).template copy_from<kThreads>(operands.b, k, block_n, K, N, N, thread);
    } else {
      b_tile(stage).template copy_from<kThreads>(operands.b, block_n, k, N, K, K, thread);
    }
    ptx::commit_copies();
  };
  // This thread's word of the tile of dy at k: (kM, kK / 32), or (kK, kM / 32) where the tile holds (K, M).
  const auto mask_word = [&](int64_t k) -> uint32_t {
    constexpr int kPerRow = (O::kATransposed ? kM : kK) / 32;
    const int64_t row = (O::kATransposed ? k : block_m) + thread / kPerRow;
    const int64_t word = (O::kATransposed ? block_m : k) / 32 + thread % kPerRow;
    return row < l.N && word < words ? l.mask[row * words + word] : 0;
  };

  float acc[kFragmentsM][kFragmentsN][4] = {};
  float row_sums[kFragmentsM][2] = {};
  copy_stage(0, 0);
  if (masked) mask_tile(0)[thread] = mask_word(0);
  int stage = 0;
#pragma unroll 1
  for (int64_t k = 0; k < K; k += kK, stage ^= 1) {
    ptx::wait_copies<0>();
    // What was copied is there for all, and all are done with the other stage.
    ptx::block_barrier();
    uint32_t next_word = 0;
    if (k + kK < K) {
      copy_stage(k + kK, stage ^ 1);
      if (masked) next_word = mask_word(k + kK);
    }
    const ATile a_here = a_tile(stage);
    const BTile b_here = b_tile(stage);
    const uint32_t* const mask_here = mask_tile(stage);
#pragma unroll
    for (int step = 0; step < kK; step += 16) {
      uint32_t b[kFragmentsN / 2][4];
#pragma unroll
      for (int n = 0; n < kFragmentsN / 2; ++n) {
        if constexpr (O::kBTransposed) {
          load_b_transposed(b[n], b_here, warp_n + 16 * n, step, lane);
        } else {
          load_b(b[n], b_here, warp_n + 16 * n, step, lane);
        }
      }
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) {
        uint32_t a[4];
        const int row = warp_m + 16 * m + lane / 4, column = step + lane % 4 * 2;  // of a[0]'s first element
        if constexpr (O::kATransposed) {
          load_a_transposed(a, a_here, warp_m + 16 * m, step, lane);
        } else {
          load_a(a, a_here, warp_m + 16 * m, step, lane);
        }
        if (masked) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = row + i % 2 * 8, c = column + i / 2 * 8;
            if constexpr (O::kATransposed) {
              const uint32_t *const first = mask_here + c * (kM / 32) + r / 32, *const second = first + kM / 32;
              a[i] = select(a[i], *first >> r % 32, *second >> r % 32);
            } else {
              const uint32_t word = mask_here[r * (kK / 32) + c / 32] >> c % 32;
              a[i] = select(a[i], word, word >> 1);
            }
          }
        }
        if (sums_rows) {
#pragma unroll
          for (int i = 0; i < 4; ++i) row_sums[m][i % 2] += low<T>(a[i]) + high<T>(a[i]);
        }
#pragma unroll
        for (int n = 0; n < kFragmentsN; ++n) {
          ptx::multiply_add<T>(acc[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
    if (masked) mask_tile(stage ^ 1)[thread] = next_word;
  }
  ptx::wait_copies<0>();  // of zeros, where K is 0

#pragma unroll
  for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = block_m + warp_m + 16 * m + 8 * half + lane / 4;
      uint32_t positive = 0;
#pragma unroll
      for (int n = 0; n < kFragmentsN; ++n) {
        const int64_t column = block_n + warp_n + 8 * n + lane % 4 * 2;
        const bool inside = row < M && column < N;  // and so is the next column: N is even
        float first = acc[m][n][2 * half], second = acc[m][n][2 * half + 1];
        if constexpr (!kBackward) {
          if (l.bias != nullptr && inside) {
            first += ptx::to_float(l.bias[column]);
            second += ptx::to_float(l.bias[column + 1]);
          }
          if (l.relu) {
            // Of the rounded sum, as who saves y instead would have it.
            const uint32_t pair = ptx::pack<T>(first, second);
            const bool first_is = low<T>(pair) > 0.0f, second_is = high<T>(pair) > 0.0f;
            positive |= (static_cast<uint32_t>(first_is) | static_cast<uint32_t>(second_is) << 1)
                        << (8 * n + lane % 4 * 2);
            first = first <= 0.0f ? 0.0f : first;  // NaN stays
            second = second <= 0.0f ? 0.0f : second;
          }
        }
        if (!inside) continue;
        const int64_t at = row * N + column;
        if (l.result_is_float) {
          static_cast<float*>(l.result)[at] = first;
          static_cast<float*>(l.result)[at + 1] = second;
        } else {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(l.result) + at) = ptx::pack<T>(first, second);
        }
      }
      if constexpr (!kBackward) {
        if (l.mask != nullptr) {
          positive |= ptx::shuffle_xor(positive, 1);
          positive |= ptx::shuffle_xor(positive, 2);
          const int64_t word = (block_n + warp_n) / 32;
          if (lane % 4 == 0 && row < M && word < words) l.mask[row * words + word] = positive;
        }
      }
      if (sums_rows) {
        float sum = row_sums[m][half];
        sum += ptx::shuffle_xor(sum, 1);
        sum += ptx::shuffle_xor(sum, 2);
        if (lane % 4 == 0 && row < M) {
          if (l.result_is_float) {
            static_cast<float*>(l.dbias)[row] = sum;
          } else {
            static_cast<T*>(l.dbias)[row] = ptx::from_float<T>(sum);
          }
        }
      }
    }
  }
}

template <class T>
struct Masking {
  const T* dy;
  const unsigned char* mask;
  T* dh;
  int64_t N;
  int F;
};

constexpr int kMaskThreads = 256;

// A thread takes the 8 elements of one byte of the mask.
template <class T>
__global__ void __launch_bounds__(kMaskThreads) linear_mask_kernel(const Masking<T> m) {
  const int64_t bytes = m.F / 8, index = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  const int64_t row = index / bytes, byte = index % bytes;
  if (row >= m.N) return;
  const uint32_t bits = m.mask[row * ((m.F + 127) / 128 * 16) + byte];
  Vector<T> elements;
  elements.load(m.dy + 8 * index, 8, true);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    elements.bits.words[i] = select(elements.bits.words[i], bits >> 2 * i, bits >> (2 * i + 1));
  }
  elements.store(m.dh + 8 * index, 8, true);
}

template <class T, LinearProduct product>
void launch_product(const Linear<T>& l, int64_t M, int64_t N, Stream stream) {
  if (M == 0 || N == 0) return;
  const int64_t tiles = ((M + kM - 1) / kM) * ((N + kN - 1) / kN);
  launch(linear_product_kernel<T, product>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
         2 * Operands<T, product>::kStageBytes, stream, l);
}

}  // namespace

template <class T>
void launch_linear(LinearProduct product, const Linear<T>& l, Stream stream) {
  switch (product) {
    case LinearProduct::kForward:
      return launch_product<T, LinearProduct::kForward>(l, l.N, l.F, stream);
    case LinearProduct::kInput:
      return launch_product<T, LinearProduct::kInput>(l, l.N, l.C, stream);
    case LinearProduct::kWeight:
      return launch_product<T, LinearProduct::kWeight>(l, l.F, l.C, stream);
  }
}

template <class T>
void launch_linear_mask(const T* dy, const uint32_t* mask, T* dh, int64_t N, int F, Stream stream) {
  const int64_t blocks = (N * (F / 8) + kMaskThreads - 1) / kMaskThreads;
  if (blocks == 0) return;
  const Masking<T> arguments = {dy, reinterpret_cast<const unsigned char*>(mask), dh, N, F};
  launch(linear_mask_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kMaskThreads), 0, stream, arguments);
}

template void launch_linear(LinearProduct, const Linear<bf16>&, Stream);
template void launch_linear(LinearProduct, const Linear<fp16>&, Stream);
template void launch_linear_mask(const bf16*, const uint32_t*, bf16*, int64_t, int, Stream);
template void launch_linear_mask(const fp16*, const uint32_t*, fp16*, int64_t, int, Stream);

}  // namespace warploom::cuda

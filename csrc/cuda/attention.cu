// Attention with an online softmax (Dao et al., 2022). Forward, and for the gradient of q, a block takes 64 queries and
// walks over the keys; for those of k and v it takes 64 keys and walks over the queries. So every sum has one owner and
// one order, at the price of computing the scores twice on the way back. Tiles of what is walked over are copied while
// those before are multiplied.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "cuda/attention.h"
#include "cuda/tiles.cuh"

namespace warploom::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kOwn = 64;  // rows that a block owns: queries, or keys
constexpr int kWarpsOfRows = kOwn / 16;
template <int D>
constexpr int kStored = (D + 63) / 64 * 64;  // columns of a tile

// What rows of one head a tile shows.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  int count;
};

template <class T>
__device__ Rows<T> rows_of(const T* tensor, const HeadStrides& at, int batch, int head, int count) {
  return {tensor + batch * at.batch + head * at.head, at.row, count};
}

template <int threads, class T, class Tile>
__device__ void copy_rows(const Tile& tile, const Rows<T>& rows, int first_row, int D) {
  tile.template copy_from<threads>(rows.first, first_row, 0, rows.count, D, rows.stride, threadIdx.x);
}

// Tiles of the two tensors that a block walks over, in two stages.
template <class Tile>
struct Stages {
  unsigned char* memory;

  __device__ Tile first(int stage) const { return {memory + 2 * stage * Tile::kBytes}; }
  __device__ Tile second(int stage) const { return {memory + (2 * stage + 1) * Tile::kBytes}; }

  template <int threads, class T>
  __device__ void copy(int stage, const Rows<T>& first_rows, const Rows<T>& second_rows, int first_row, int D) const {
    copy_rows<threads>(first(stage), first_rows, first_row, D);
    copy_rows<threads>(second(stage), second_rows, first_row, D);
    ptx::commit_copies();
  }
};

// Calls multiply(at, stage) for at = 0, size, ... below end, and before each copy(at, stage) for the one after it. What
// the block owns has been asked for before, and is there at the first multiply.
template <class Copy, class Multiply>
__device__ void walk(int end, int size, const Copy& copy, const Multiply& multiply) {
  if (end > 0) copy(0, 0);
  ptx::commit_copies();
  int stage = 0;
#pragma unroll 1
  for (int at = 0; at < end; at += size, stage ^= 1) {
    ptx::wait_copies<0>();
    ptx::block_barrier();
    if (at + size < end) copy(at + size, stage ^ 1);
    multiply(at, stage);
  }
  ptx::wait_copies<0>();  // where nothing was walked over
}

// Query i sees the keys before this.
template <class T>
__device__ int end_of_keys(const Attention<T>& a, int query) {
  if (!a.causal) return a.length_k;
  const int end = query + 1 + a.length_k - a.length_q;
  return end < a.length_k ? end : a.length_k;
}

// A block's place among the queries, and this thread's in it.
template <class T>
struct OwnQueries {
  int first, head, batch, lane, warp_row;
  int end;  // of the keys that any query of the block sees
  Rows<T> k, v;

  // The last queries see the most keys: begun first, they leave no long tail.
  __device__ explicit OwnQueries(const Attention<T>& a)
      : first(static_cast<int>(gridDim.x - 1 - blockIdx.x) * kOwn),
        head(blockIdx.y % a.H),
        batch(blockIdx.y / a.H),
        lane(threadIdx.x % ptx::kWarp),
        warp_row(threadIdx.x / ptx::kWarp * 16),
        end(end_of_keys(a, min(first + kOwn, a.length_q) - 1)),
        k(rows_of(a.k, a.k_at, batch, head / (a.H / a.H_kv), a.length_k)),
        v(rows_of(a.v, a.v_at, batch, head / (a.H / a.H_kv), a.length_k)) {}

  // This lane's two rows.
  __device__ int query(int half) const { return first + warp_row + 8 * half + lane / 4; }
  // Of a (B, H, T) tensor.
  __device__ int64_t row(const Attention<T>& a, int half) const {
    return (static_cast<int64_t>(batch) * a.H + head) * a.length_q + query(half);
  }
};

__device__ float quad_max(float x) {
  x = fmaxf(x, ptx::shuffle_xor(x, 1));
  return fmaxf(x, ptx::shuffle_xor(x, 2));
}
__device__ float quad_sum(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

// products (16 x columns) = a_tile's rows from row on times b_tile's rows, both (rows, D).
template <int D, class T, int fragments, class ATile, class BTile>
__device__ void multiply_rows(float (&products)[fragments][4], const ATile& a_tile, int row, const BTile& b_tile,
                              int lane) {
#pragma unroll
  for (int n = 0; n < fragments; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
  }
  // Not further: with all fragments on their way at once, the registers did not suffice.
#pragma unroll 2
  for (int d = 0; d < D; d += 16) {
    uint32_t a[4];
    load_a(a, a_tile, row, d, lane);
#pragma unroll
    for (int n = 0; n < fragments; n += 2) {
      uint32_t b[4];
      load_b(b, b_tile, 8 * n, d, lane);
      ptx::multiply_add<T>(products[n], a, b[0], b[1]);
      ptx::multiply_add<T>(products[n + 1], a, b[2], b[3]);
    }
  }
}

// acc (16 x columns from `first` on) += weights (16 x rows of the tile) times the tile. The weights are where
// multiply_rows leaves its products: two neighbours make an operand of the next multiplication.
template <class T, int fragments, int columns, class Tile>
__device__ void add_weighted(float (&acc)[columns][4], const float (&weights)[fragments][4], const Tile& tile,
                             int first, int lane) {
#pragma unroll
  for (int n = 0; n < fragments; n += 2) {
    const uint32_t a[4] = {ptx::pack<T>(weights[n][0], weights[n][1]), ptx::pack<T>(weights[n][2], weights[n][3]),
                           ptx::pack<T>(weights[n + 1][0], weights[n + 1][1]),
                           ptx::pack<T>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
    for (int c = 0; c < columns; c += 2) {
      uint32_t b[4];
      load_b_transposed(b, tile, first + 8 * c, 8 * n, lane);
      ptx::multiply_add<T>(acc[c], a, b[0], b[1]);
      ptx::multiply_add<T>(acc[c + 1], a, b[2], b[3]);
    }
  }
}

// acc * factor for the two rows of this lane.
template <class T, int columns>
__device__ void store_rows(const float (&acc)[columns][4], float factor0, float factor1, T* tensor, int64_t stride,
                           int row, int count, int first, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    const float factor = half == 0 ? factor0 : factor1;
    if (r >= count) continue;
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int column = first + 8 * c + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(tensor + r * stride + column) =
          ptx::pack<T>(acc[c][2 * half] * factor, acc[c][2 * half + 1] * factor);
    }
  }
}

// Keys of one step, by head width: as many as two stages leave shared memory for.
template <int D>
constexpr int kFwdKeys = D > 128 ? 32 : 64;

template <class T, int D>
__global__ void __launch_bounds__(kWarpsOfRows* ptx::kWarp) attention_fwd_kernel(const Attention<T> a) {
  constexpr int kKeys = kFwdKeys<D>, kThreads = kWarpsOfRows * ptx::kWarp, kFragments = kKeys / 8;
  using QTile = Tile<T, kOwn, kStored<D>>;
  using KTile = Tile<T, kKeys, kStored<D>>;
  auto* const shared = ptx::shared_memory<unsigned char>();
  const OwnQueries<T> own(a);
  const QTile q_tile{shared};
  const Stages<KTile> tiles{shared + QTile::kBytes};
  const float scale = a.softmax_scale * kLog2E;
  float acc[D / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  int ends[2];
  for (int half = 0; half < 2; ++half) ends[half] = end_of_keys(a, own.query(half));
  copy_rows<kThreads>(q_tile, rows_of(a.q, a.q_at, own.batch, own.head, a.length_q), own.first, D);
  const auto copy = [&](int key, int stage) { tiles.template copy<kThreads>(stage, own.k, own.v, key, D); };
  walk(own.end, kKeys, copy, [&](int key, int stage) {
    float s[kFragments][4];
    multiply_rows<D, T>(s, q_tile, own.warp_row, tiles.first(stage), own.lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half];
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[n][2 * half + i];
          score = key + 8 * n + own.lane % 4 * 2 + i < ends[half] ? score * scale : -INFINITY;
          largest = fmaxf(largest, score);
        }
      }
      largest = quad_max(largest);
      const float shift = largest == -INFINITY ? 0.0f : largest;  // a row that has seen nothing yet
      const float factor = ptx::exp2_approx(maximum[half] - shift);
      maximum[half] = largest;
      float row_sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          s[n][2 * half + i] = ptx::exp2_approx(s[n][2 * half + i] - shift);
          row_sum += s[n][2 * half + i];
        }
      }
      sum[half] = sum[half] * factor + row_sum;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        acc[c][2 * half] *= factor;
        acc[c][2 * half + 1] *= factor;
      }
    }
    add_weighted<T>(acc, s, tiles.second(stage), 0, own.lane);
  });

  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]);
    factors[half] = total > 0.0f ? 1.0f / total : 0.0f;
    if (own.lane % 4 == 0 && own.query(half) < a.length_q) {
      a.lse[own.row(a, half)] = total > 0.0f ? maximum[half] * kLn2 + logf(total) : -INFINITY;
    }
  }
  store_rows(acc, factors[0], factors[1], a.o + own.batch * a.o_at.batch + own.head * a.o_at.head, a.o_at.row,
             own.query(0), a.length_q, 0, own.lane);
}

// One warp a query.
template <class T>
__global__ void attention_delta_kernel(const Attention<T> a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= static_cast<int64_t>(a.B) * a.H * a.length_q) return;
  const int query = static_cast<int>(row % a.length_q);
  const int64_t head = row / a.length_q % a.H, batch = row / a.length_q / a.H;
  const T* const o = a.o + batch * a.o_at.batch + head * a.o_at.head + query * a.o_at.row;
  const T* const dO = a.dO + batch * a.dO_at.batch + head * a.dO_at.head + query * a.dO_at.row;
  float sum = 0.0f;
  for (int d = threadIdx.x; d < a.D; d += ptx::kWarp) sum += ptx::to_float(o[d]) * ptx::to_float(dO[d]);
  for (int mask = ptx::kWarp / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  if (threadIdx.x == 0) a.delta[row] = sum;
}

// Rows of one step on the way back.
template <int D>
constexpr int kBwdRows = D > 128 ? 16 : 32;
template <int D>
constexpr int kBwdSharedBytes = (2 * kOwn + 4 * kBwdRows<D>)*kStored<D> * 2;

template <class T, int D>
__global__ void __launch_bounds__(kWarpsOfRows* ptx::kWarp) attention_bwd_dq_kernel(const Attention<T> a) {
  constexpr int kKeys = kBwdRows<D>, kThreads = kWarpsOfRows * ptx::kWarp, kFragments = kKeys / 8;
  using QTile = Tile<T, kOwn, kStored<D>>;
  using KTile = Tile<T, kKeys, kStored<D>>;
  auto* const shared = ptx::shared_memory<unsigned char>();
  const OwnQueries<T> own(a);
  const QTile q_tile{shared}, dO_tile{shared + QTile::kBytes};
  const Stages<KTile> tiles{shared + 2 * QTile::kBytes};
  const float scale = a.softmax_scale * kLog2E;
  float acc[D / 8][4] = {};
  float lse[2], delta[2];
  int ends[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool inside = own.query(half) < a.length_q;
    lse[half] = inside ? a.lse[own.row(a, half)] * kLog2E : 0.0f;
    delta[half] = inside ? a.delta[own.row(a, half)] : 0.0f;
    ends[half] = inside ? end_of_keys(a, own.query(half)) : 0;
  }
  copy_rows<kThreads>(q_tile, rows_of(a.q, a.q_at, own.batch, own.head, a.length_q), own.first, D);
  copy_rows<kThreads>(dO_tile, rows_of(a.dO, a.dO_at, own.batch, own.head, a.length_q), own.first, D);
  const auto copy = [&](int key, int stage) { tiles.template copy<kThreads>(stage, own.k, own.v, key, D); };
  walk(own.end, kKeys, copy, [&](int key, int stage) {
    float s[kFragments][4], dp[kFragments][4];
    multiply_rows<D, T>(s, q_tile, own.warp_row, tiles.first(stage), own.lane);
    multiply_rows<D, T>(dp, dO_tile, own.warp_row, tiles.second(stage), own.lane);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool seen = key + 8 * n + own.lane % 4 * 2 + i % 2 < ends[i / 2];
        const float p = seen ? ptx::exp2_approx(s[n][i] * scale - lse[i / 2]) : 0.0f;
        s[n][i] = p * (dp[n][i] - delta[i / 2]);
      }
    }
    add_weighted<T>(acc, s, tiles.first(stage), 0, own.lane);
  });
  store_rows(acc, a.softmax_scale, a.softmax_scale, a.dq + own.batch * a.dq_at.batch + own.head * a.dq_at.head,
             a.dq_at.row, own.query(0), a.length_q, 0, own.lane);
}

// Warps that share the keys of one: each has all their scores and a part of the columns of their gradients, of which
// the registers do not hold more.
template <int D>
constexpr int kColumnParts = D > 64 ? 2 : 1;

template <class T, int D>
__global__ void __launch_bounds__(kWarpsOfRows* kColumnParts<D>* ptx::kWarp)
    attention_bwd_dkdv_kernel(const Attention<T> a) {
  constexpr int kQueries = kBwdRows<D>, kFragments = kQueries / 8;
  constexpr int kThreads = kWarpsOfRows * kColumnParts<D> * ptx::kWarp, kColumns = D / kColumnParts<D>;
  using KTile = Tile<T, kOwn, kStored<D>>;
  using QTile = Tile<T, kQueries, kStored<D>>;
  auto* const shared = ptx::shared_memory<unsigned char>();
  const int first_key = static_cast<int>(blockIdx.x) * kOwn;
  const int head_kv = blockIdx.y % a.H_kv, batch = blockIdx.y / a.H_kv, group = a.H / a.H_kv;
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int warp_row = warp % kWarpsOfRows * 16, first_column = warp / kWarpsOfRows * kColumns;
  const KTile k_tile{shared}, v_tile{shared + KTile::kBytes};
  const Stages<QTile> tiles{shared + 2 * KTile::kBytes};

  // The steps go through the heads of the group, and in each through the queries that see any of the keys.
  const int shift = a.causal ? a.length_k - a.length_q : a.length_k;
  const int first_query = a.causal ? max(0, first_key - shift) / kQueries * kQueries : 0;
  const int steps_of_head = a.length_q > first_query ? (a.length_q - first_query + kQueries - 1) / kQueries : 0;
  const int steps = group * steps_of_head;
  const auto head_of = [&](int step) { return head_kv * group + step / steps_of_head; };
  const auto query_of = [&](int step) { return first_query + step % steps_of_head * kQueries; };
  const auto copy = [&](int step, int stage) {
    const int head = head_of(step);
    tiles.template copy<kThreads>(stage, rows_of(a.q, a.q_at, batch, head, a.length_q),
                                  rows_of(a.dO, a.dO_at, batch, head, a.length_q), query_of(step), D);
  };

  const float scale = a.softmax_scale * kLog2E;
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  copy_rows<kThreads>(k_tile, rows_of(a.k, a.k_at, batch, head_kv, a.length_k), first_key, D);
  copy_rows<kThreads>(v_tile, rows_of(a.v, a.v_at, batch, head_kv, a.length_k), first_key, D);
  walk(steps, 1, copy, [&](int step, int stage) {
    const int64_t row = (static_cast<int64_t>(batch) * a.H + head_of(step)) * a.length_q;
    const int query = query_of(step);
    float p[kFragments][4], ds[kFragments][4];  // rows are keys, columns queries
    multiply_rows<D, T>(p, k_tile, warp_row, tiles.first(stage), lane);
    multiply_rows<D, T>(ds, v_tile, warp_row, tiles.second(stage), lane);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int of_query = query + 8 * n + lane % 4 * 2 + i % 2;
        const int key = first_key + warp_row + lane / 4 + i / 2 * 8;
        const bool seen = of_query < a.length_q && key < a.length_k && (!a.causal || key <= of_query + shift);
        p[n][i] = seen ? ptx::exp2_approx(p[n][i] * scale - a.lse[row + of_query] * kLog2E) : 0.0f;
        ds[n][i] = seen ? p[n][i] * (ds[n][i] - a.delta[row + of_query]) : 0.0f;
      }
    }
    add_weighted<T>(dv, p, tiles.second(stage), first_column, lane);
    add_weighted<T>(dk, ds, tiles.first(stage), first_column, lane);
  });
  const int row = first_key + warp_row + lane / 4;
  store_rows(dk, a.softmax_scale, a.softmax_scale, a.dk + batch * a.dk_at.batch + head_kv * a.dk_at.head, a.dk_at.row,
             row, a.length_k, first_column, lane);
  store_rows(dv, 1.0f, 1.0f, a.dv + batch * a.dv_at.batch + head_kv * a.dv_at.head, a.dv_at.row, row, a.length_k,
             first_column, lane);
}

unsigned blocks_of(int64_t rows, int per_block) { return static_cast<unsigned>((rows + per_block - 1) / per_block); }

template <class T, int D>
void launch_fwd(const Attention<T>& a, Stream stream) {
  const int bytes = (kOwn + 4 * kFwdKeys<D>)*kStored<D> * 2;
  launch(attention_fwd_kernel<T, D>, dim3(blocks_of(a.length_q, kOwn), a.B * a.H), dim3(kWarpsOfRows * ptx::kWarp),
         bytes, stream, a);
}

template <class T, int D>
void launch_bwd(const Attention<T>& a, Stream stream) {
  if (a.H > 0 && a.length_q > 0) {
    launch(attention_bwd_dq_kernel<T, D>, dim3(blocks_of(a.length_q, kOwn), a.B * a.H), dim3(kWarpsOfRows * ptx::kWarp),
           kBwdSharedBytes<D>, stream, a);
  }
  if (a.length_k > 0) {
    launch(attention_bwd_dkdv_kernel<T, D>, dim3(blocks_of(a.length_k, kOwn), a.B * a.H_kv),
           dim3(kWarpsOfRows * kColumnParts<D> * ptx::kWarp), kBwdSharedBytes<D>, stream, a);
  }
}

}  // namespace

bool attention_takes(int64_t D) { return D == 64 || D == 96 || D == 128 || D == 256; }

template <class T>
void launch_attention_fwd(const Attention<T>& a, Stream stream) {
  if (a.B == 0 || a.H == 0 || a.length_q == 0) return;
  switch (a.D) {
    case 64:
      return launch_fwd<T, 64>(a, stream);
    case 96:
      return launch_fwd<T, 96>(a, stream);
    case 128:
      return launch_fwd<T, 128>(a, stream);
    case 256:
      return launch_fwd<T, 256>(a, stream);
  }
}

template <class T>
void launch_attention_bwd(const Attention<T>& a, Stream stream) {
  if (a.B == 0) return;
  constexpr int kRows = 8;
  const int64_t rows = static_cast<int64_t>(a.B) * a.H * a.length_q;
  if (rows > 0) {
    launch(attention_delta_kernel<T>, dim3(blocks_of(rows, kRows)), dim3(ptx::kWarp, kRows), 0, stream, a);
  }
  switch (a.D) {
    case 64:
      return launch_bwd<T, 64>(a, stream);
    case 96:
      return launch_bwd<T, 96>(a, stream);
    case 128:
      return launch_bwd<T, 128>(a, stream);
    case 256:
      return launch_bwd<T, 256>(a, stream);
  }
}

template void launch_attention_fwd(const Attention<bf16>&, Stream);
template void launch_attention_fwd(const Attention<fp16>&, Stream);
template void launch_attention_bwd(const Attention<bf16>&, Stream);
template void launch_attention_bwd(const Attention<fp16>&, Stream);

}  // namespace warploom::cuda

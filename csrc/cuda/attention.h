// o = softmax(softmax_scale * q k^T) v per head, causal or not, and its gradients, on a GPU.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/stream.h"

namespace warploom::cuda {

// Where a (B, H, T, D) tensor keeps its rows of D elements, which are dense: elements from one to the next, multiples
// of 8.
struct HeadStrides {
  int64_t batch, head, row;
};

template <class T>
struct Attention {
  const T *q, *k, *v;  // (B, H, T, D); (B, H_kv, S, D) twice
  T* o;                // (B, H, T, D): written forward, read backward
  float* lse;          // (B, H, T): log-sum-exp of each query's scores, minus infinity where it sees no key
  const T* dO;         // (B, H, T, D)
  float* delta;        // (B, H, T): sum of dO * o over D, made on the way
  T *dq, *dk, *dv;
  HeadStrides q_at, k_at, v_at, o_at, dO_at, dq_at, dk_at, dv_at;
  int B, H, H_kv, length_q, length_k, D;  // D: 64, 96, 128 or 256; length_q = T, length_k = S
  bool causal;                            // query i sees the keys j <= i + S - T
  float softmax_scale;                    // positive
};

bool attention_takes(int64_t D);

// T: bf16, fp16. Every pointer is a multiple of 16 bytes.
template <class T>
void launch_attention_fwd(const Attention<T>& arguments, Stream stream);
template <class T>
void launch_attention_bwd(const Attention<T>& arguments, Stream stream);

}  // namespace warploom::cuda

// Attention, forward and backward, with online softmax: no (T, S) matrix is ever held.
//
// The kernels know one thing only, sequences: some query rows against some keys with a diagonal. The batch, key
// lengths, causality and packed documents are all said in those terms by the caller, so that what is not seen is not
// computed.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

// (B, H, T, D) with D dense: element (b, h, t, d) is data[b * b_stride + h * h_stride + t * t_stride + d].
template <class T>
struct HeadsOf {
  T* data;
  int64_t b_stride, h_stride, t_stride;

  T* row(int64_t b, int64_t h, int64_t t) const { return data + b * b_stride + h * h_stride + t * t_stride; }
};

// Query i of this sequence sees its keys j < seen_keys with j <= i + diagonal. Positions are relative to the firsts.
struct AttentionSequence {
  int64_t b, first_query, num_queries, first_key, num_keys, seen_keys, diagonal;
};

// Added to the scaled scores: (heads, rows, columns) with columns dense. A sequence uses its top-left corner.
struct AttentionBias {
  const void* data;  // null: none
  bool is_float;     // else of the type of q
  int64_t heads;     // 1: the same for all
  int64_t h_stride, row_stride;
};

struct AttentionProblem {
  int64_t H, H_kv, T, D;
  const AttentionSequence* sequences;  // each query and each key belongs to exactly one
  int64_t num_sequences;
  double softmax_scale;
};

template <class T>
struct AttentionForward {
  AttentionProblem problem;
  HeadsOf<const T> q, k, v;
  AttentionBias bias;
  HeadsOf<T> o;
  typename Accumulator<T>::type* lse;  // (B, H, T): natural log of the sum of exponentials; -inf for o = 0
};

template <class T>
struct AttentionBackward {
  AttentionProblem problem;
  HeadsOf<const T> d_o, q, k, v, o;
  const typename Accumulator<T>::type* lse;
  AttentionBias bias;
  HeadsOf<T> dq, dk, dv;
  void* dbias;  // like bias, dense: (heads, bias_rows, bias_columns); null without
  int64_t bias_rows, bias_columns;
  // How many pieces to cut the work into if it allows. Results depend on it, since it decides where sums are cut;
  // so it is the machine's number of processors and not the number of threads in use.
  int64_t parallelism;
};

template <class T>
struct AttentionKernels {
  void (*fwd)(const AttentionForward<T>&);
  void (*bwd)(const AttentionBackward<T>&);
};

using AttentionTable = PerDtype<AttentionKernels>;

WARPLOOM_DISPATCH(AttentionTable, attention)

}  // namespace warploom::cpu

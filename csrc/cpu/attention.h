// Attention, forward and backward, with online softmax: no (T, S) matrix is ever held.
//
// The kernels know one thing only, sequences: some query rows against some keys between two diagonals. The batch, key
// lengths, causality, windows and packed documents are all said in those terms by the caller, so that what is not seen
// is not computed.
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

// Query i of this sequence sees its keys j < seen_keys with first_diagonal <= j - i <= last_diagonal. Positions are
// relative to the firsts.
struct AttentionSequence {
  int64_t b, first_query, num_queries, first_key, num_keys, seen_keys, first_diagonal, last_diagonal;
};

// Added to the scaled scores of query i and key j of a sequence: data[h * h_stride + offset + i * row_stride + j]. With
// a row stride of -1 that is a number per distance j - i, and offset the place of distance 0.
struct AttentionBias {
  const void* data;  // null: none
  bool is_float;     // else of the type of q
  int64_t heads;     // 1: the same for all
  int64_t h_stride, offset, row_stride;

  bool by_distance() const { return row_stride < 0; }
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
  void* dbias;  // like bias, dense: (heads, dbias_rows, dbias_columns), one row if by distance; null: not wanted
  int64_t dbias_rows, dbias_columns;
  // How many pieces to cut the work into if it allows. Results depend on it, since it decides where sums are cut;
  // so it is the machine's number of processors and not the number of threads in use.
  int64_t parallelism;
};

template <class T>
using AttentionForwardKernel = void (*)(const AttentionForward<T>&);
template <class T>
using AttentionBackwardKernel = void (*)(const AttentionBackward<T>&);

using AttentionForwardTable = PerDtype<AttentionForwardKernel>;
using AttentionBackwardTable = PerDtype<AttentionBackwardKernel>;

WARPLOOM_DISPATCH(AttentionForwardTable, attention_fwd)
WARPLOOM_DISPATCH(AttentionBackwardTable, attention_bwd)

}  // namespace warploom::cpu

// A queue of work for a GPU, by name alone: no header of CUDA.
#pragma once

struct CUstream_st;

namespace warploom {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace warploom

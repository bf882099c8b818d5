// How host code starts a kernel and asks about the card. Every CUDA call of the project is in this file.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "common/stream.h"

namespace warploom {

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Calls kernel(arguments) in every thread. shared_bytes: of shared_memory(), up to what the card has at most.
template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, dim3 block, int shared_bytes, Stream stream,
            const Arguments& arguments) {
  if (shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments);
  check_cuda(cudaGetLastError());
}

// Of the current device.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace warploom

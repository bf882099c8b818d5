// Many tensors cut into blocks for one parallel loop, so that a model's many small tensors cost no loop of their own.
#pragma once

#include "common/parallel.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

struct TensorBlock {
  int64_t tensor, begin, end;  // of the tensor's elements
};

struct TensorBlocks {
  const TensorBlock* blocks;
  int64_t count;
};

// size_of(tensor) and elements_per_block(tensor) are functions of the number of a tensor, below `tensors`. The result
// is in scratch slot 0.
template <class SizeOf, class ElementsPerBlock>
static TensorBlocks cut_into_blocks(int64_t tensors, const SizeOf& size_of,
                                    const ElementsPerBlock& elements_per_block) {
  int64_t count = 0;
  for (int64_t i = 0; i < tensors; ++i) count += (size_of(i) + elements_per_block(i) - 1) / elements_per_block(i);
  TensorBlock* blocks = scratch<TensorBlock>(0, count);
  count = 0;
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t size = size_of(i), elements = elements_per_block(i);
    for (int64_t begin = 0; begin < size; begin += elements) {
      blocks[count++] = {i, begin, begin + elements < size ? begin + elements : size};
    }
  }
  return {blocks, count};
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL

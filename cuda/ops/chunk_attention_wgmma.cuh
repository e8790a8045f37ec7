// chunk_attention by Hopper's matrix instructions (chunk_attention_wgmma.cu), where the build has them.
#pragma once

#include "ops/chunk_attention.h"

namespace megalodon::cuda {

// Of 16-bit numbers in aligned packs, in tiles of 128 x 128. nullptr in a build without sm_90a.
__attribute__((weak)) void chunk_attention_wgmma_forward(const ChunkAttentionForward& args, void* stream);
__attribute__((weak)) void chunk_attention_wgmma_backward(const ChunkAttentionBackward& args, void* stream);

}  // namespace megalodon::cuda

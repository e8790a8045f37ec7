// How a GPU computes cema by transforms (cuda/ops/cema_fft.cu): what lies where in the workspace.
//
// Forward without h0 the outputs are a convolution with the response, and the last state is the scan's: the states that
// pieces of time end with, 4 N FMA per element. Backward without h0 and dh all is the gradient of that convolution.
// Where a state comes in or its gradient does, the scan does it all: what leads from h0 to every output costs 6 N FMA
// per element, as the whole scan does, and its gradient the 14 N of the scan's larger half. Packed rows are the scan's.
#pragma once

#include "ops/cema_kernel.h"
#include "ops/fft_conv.h"

namespace megalodon {

// Bytes from the beginning of the workspace, multiples of 16.
struct CemaFftCudaRoom {
  int64_t response;  // [D, L] stat: k_t, with omega in k_0
  int64_t gradient;  // [D, L] stat: backward alone, dS/dk
  int64_t rest;      // what fft_conv needs, and then what cema_kernel_backward does
  int64_t bytes;

  // `states`: bytes that come before, of the last states.
  static CemaFftCudaRoom forward(int64_t states, DType dtype, int64_t B, int64_t L, int64_t D) {
    CemaFftCudaRoom room{};
    FftConvForward conv{};
    conv.dtype = dtype;
    conv.B = B;
    conv.L = L;
    conv.D = D;
    room.response = round_up(states, 16);
    room.rest = room.response + steps_bytes(dtype, L, D);
    room.bytes = room.rest + conv.cuda_plan().workspace_bytes(L, D);
    return room;
  }
  static CemaFftCudaRoom backward(DType dtype, int64_t B, int64_t L, int64_t D, int64_t N) {
    CemaFftCudaRoom room{};
    FftConvBackward conv{};
    conv.dtype = dtype;
    conv.B = B;
    conv.L = L;
    conv.D = D;
    room.gradient = steps_bytes(dtype, L, D);
    room.rest = 2 * room.gradient;
    const int64_t convolution = conv.cuda_plan().workspace_bytes(L, D), kernel = cema_kernel_cuda_bytes(D, N, L);
    room.bytes = room.rest + (convolution > kernel ? convolution : kernel);
    return room;
  }

 private:
  static int64_t steps_bytes(DType dtype, int64_t L, int64_t D) {
    return round_up(D * L * size_of(stat_dtype(dtype)), 16);
  }
};

}  // namespace megalodon

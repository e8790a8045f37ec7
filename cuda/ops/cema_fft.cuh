// cema by transforms (cema_fft.cu), where neither h0 nor dh is given.
#pragma once

#include "ops/cema.h"

namespace megalodon::cuda {

// y alone.
void cema_fft_output(const CemaForward& args, void* stream);
// All gradients.
void cema_fft_gradients(const CemaBackward& args, void* stream);

}  // namespace megalodon::cuda

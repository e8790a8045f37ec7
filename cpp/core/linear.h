// A product of a matrix with a few vectors, as in decoding.
#pragma once

#include <cstdint>

namespace megalodon {

// y_b = scale * (W x_b + bias) + added[0]_b + added[1]_b for b < B; what is nullptr is left out.
struct Linear {
  const void* x;         // [B, in]
  const void* weight;    // [out, in]
  const void* bias;      // [out]
  const void* scale;     // [out]
  const void* added[2];  // [B, out]
  void* y;               // [B, out]
  void* wide;            // [B, in] stat: room for x of a 16-bit type; not on the GPU
  int64_t in, out;
};

}  // namespace megalodon

// silu_mul: y = silu(a) * b, or silu(a) where b is absent; silu(u) = u * sigmoid(u).
//
// With s = sigmoid(a): da = dy * b * (s + a * s * (1 - s)),   db = dy * a * s.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace megalodon {

struct SiluMulForward {
  DType dtype;    // of all
  const void* a;  // [n]
  const void* b;  // [n], nullptr: 1
  void* y;        // [n]
  int64_t n;
};

struct SiluMulBackward {
  DType dtype;     // of all
  const void* dy;  // [n]
  const void* a;   // [n]
  const void* b;   // [n], nullptr: 1
  void* da;        // [n]
  void* db;        // [n], nullptr where b is
  int64_t n;
};

static inline SiluMulForward check_silu_mul(Checker& c, const DLTensor* a_in, const DLTensor* b_in, Outputs&& out) {
  const Tensor a = c.elements("a", a_in);
  const Tensor b = b_in == nullptr ? Tensor{} : c.like("b", b_in, a);
  SiluMulForward args{};
  args.dtype = a.dtype;
  args.a = a.data;
  args.b = b.data;
  args.y = out.like(c, "y", a);
  args.n = a.count();
  return args;
}

static inline SiluMulBackward check_silu_mul_backward(Checker& c, const DLTensor* dy_in, const DLTensor* a_in,
                                                      const DLTensor* b_in, Outputs&& out) {
  const Tensor a = c.elements("a", a_in);
  const Tensor dy = c.like("dy", dy_in, a);
  const Tensor b = b_in == nullptr ? Tensor{} : c.like("b", b_in, a);
  SiluMulBackward args{};
  args.dtype = a.dtype;
  args.dy = dy.data;
  args.a = a.data;
  args.b = b.data;
  args.da = out.like(c, "da", a);
  args.db = out.gradient(c, "db", b, a.dtype);
  if (!b.present) args.db = nullptr;
  args.n = a.count();
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(silu_mul_forward, SiluMulForward)
MEGALODON_KERNEL_BF16(silu_mul_backward, SiluMulBackward)

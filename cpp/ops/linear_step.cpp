// linear_step on the CPU.
//
// Computes  y = x W^T + bias for few rows (ops/linear_step.h).
// Layout    x, y (B, in or out); W (out, in) as torch has it; all compact.
// Mapping   tiles of rows of W are split over the threads (core/linear_kernel.h).
// Traffic   W once: bound by reading it for few rows, by FMAs for many.
// Numerics  sums in stat, rounded once; with AVX512_BF16 pairs of bf16 are multiplied exactly and added at once,
//           subnormal ones as zeros. Independent of the number of threads.
// Limits    any B, in and out.
#include "ops/linear_step.h"

#include "core/linear_kernel.h"

namespace megalodon::cpu::MEGALODON_ISA {

void linear_step_forward(const LinearStep& args) {
  visit_activation(args.dtype, [&](auto tag) { linear<typename decltype(tag)::type>(args.linear, args.B); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_linear_step_forward_outputs(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                                     megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("linear_step");
    check_linear_step(c, x, weight, bias, Outputs(outputs));
  });
}

extern "C" int megalodon_linear_step_forward(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                             DLTensor* y, DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("linear_step");
    const LinearStep args = check_linear_step(c, x, weight, bias, {y, workspace});
    run_on(c, args, cpu::linear_step_forward, cuda::linear_step_forward, stream);
  });
}
#endif

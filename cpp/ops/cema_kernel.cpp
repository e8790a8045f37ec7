// cema_kernel on the CPU.
//
// Computes  k_t = Re sum_n c_n q_n^t and its gradients (ops/cema_kernel.h).
// Layout    parameters [D, N], [D], [D, N, 2]; k, dk [D, L], turned from and to columns of channels in tiles.
// Mapping   a task is a group of channels, one per lane; blocks of 32 steps share a table of powers (core/powers.h).
// Traffic   2 N FMA per element forward, 4 N FMA and 4 N additions backward; one element moved: compute-bound. Wavelets
//           that have decayed to 0 cost nothing.
// Numerics  coefficients, powers and sums over blocks in float64; a block in the parameters' type. The error, relative
//           to sum_n |c_n|, is a few roundings of that type, whatever L. Deterministic for any number of threads.
//           Subnormal numbers count as zeros.
// Limits    L < 2^26 keeps the angle exact; beyond, its error grows with L as that of any float64 t arg q does.
#include "ops/cema_kernel.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

template <class A>
void forward(const CemaKernelForward& args) {
  if (args.L == 0) return;
  const Parameters<A> parameters = Parameters<A>::of(args);
  for_channels<A>(args.tasks(), aligned(args.workspace), [&](int64_t d, int64_t lanes, Slot slot) {
    Powers<A> powers(parameters, d, slot);
    auto* c = slot.take<double>(args.N * 2 * kLanes<A>);
    products(parameters, d, c);
    A* k = static_cast<A*>(args.k) + d * args.L;
    powers.synthesize(c, args.L, [&](int64_t t, int64_t count, const Vec<A>* tile) {
      scatter_lanes(tile, lanes, count, k + t, args.L);
    });
  });
}

template <class A>
void backward(const CemaKernelBackward& args) {
  constexpr int64_t W = kLanes<A>;
  const Parameters<A> parameters = Parameters<A>::of(args);
  for_channels<A>(args.tasks(), aligned(args.workspace), [&](int64_t d, int64_t lanes, Slot slot) {
    Powers<A> powers(parameters, d, slot);
    auto* sums = slot.take<double>(args.N * 4 * W);
    auto* gradients = slot.take<double>(args.N * kWaveletSums * W);
    const A* dk = static_cast<const A*>(args.dk) + d * args.L;
    powers.template analyze<true>(
        [&](int64_t t, int64_t count, Vec<A>* tile) { gather_lanes(dk + t, args.L, lanes, count, tile); }, args.L,
        sums);
    std::memset(gradients, 0, args.N * kWaveletSums * W * sizeof(double));
    add_response_gradients(parameters, d, sums, gradients);
    write_gradients(args, parameters, d, gradients);
  });
}

}  // namespace

void cema_kernel_forward(const CemaKernelForward& args) {
  visit_stat(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void cema_kernel_backward(const CemaKernelBackward& args) {
  visit_stat(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_cema_kernel_forward_outputs(const DLTensor* alpha, const DLTensor* delta,
                                                     const DLTensor* theta, const DLTensor* gamma, int64_t length,
                                                     megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("cema_kernel");
    check_cema_kernel(c, alpha, delta, theta, gamma, length, Outputs(outputs));
  });
}

extern "C" int megalodon_cema_kernel_forward(const DLTensor* alpha, const DLTensor* delta, const DLTensor* theta,
                                             const DLTensor* gamma, int64_t length, DLTensor* k, DLTensor* workspace,
                                             void* stream) {
  return guarded([&] {
    Checker c("cema_kernel");
    const CemaKernelForward args = check_cema_kernel(c, alpha, delta, theta, gamma, length, {k, workspace});
    run_on(c, args, cpu::cema_kernel_forward, cuda::cema_kernel_forward, stream);
  });
}

extern "C" int megalodon_cema_kernel_backward_outputs(const DLTensor* dk, const DLTensor* alpha, const DLTensor* delta,
                                                      const DLTensor* theta, const DLTensor* gamma,
                                                      megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("cema_kernel_backward");
    check_cema_kernel_backward(c, dk, alpha, delta, theta, gamma, Outputs(outputs));
  });
}

extern "C" int megalodon_cema_kernel_backward(const DLTensor* dk, const DLTensor* alpha, const DLTensor* delta,
                                              const DLTensor* theta, const DLTensor* gamma, DLTensor* dalpha,
                                              DLTensor* ddelta, DLTensor* dtheta, DLTensor* dgamma, DLTensor* workspace,
                                              void* stream) {
  return guarded([&] {
    Checker c("cema_kernel_backward");
    const CemaKernelBackward args =
        check_cema_kernel_backward(c, dk, alpha, delta, theta, gamma, {dalpha, ddelta, dtheta, dgamma, workspace});
    run_on(c, args, cpu::cema_kernel_backward, cuda::cema_kernel_backward, stream);
  });
}
#endif

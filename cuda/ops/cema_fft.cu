// cema on the GPU by a causal convolution with the impulse response ("fft"). Not yet run on a GPU.
//
// Computes  y = k * x, k_t = Re sum_n a g_n q_n^t (+ omega at t = 0), and its gradients, where neither h0 nor dh is
// given
//           (ops/cema_fft.h says what the scan does in the place of it; ops/cema.h).
// Layout    x, y, dy, dx [B, L, D]; parameters [D, N], [D], [D, N, 2]; k and dS/dk [D, L] stat in the workspace, whose
//           sections begin at multiples of 16 bytes; all compact.
// Mapping   the kernels of other ops, one after the other: cema_kernel makes k; fft_conv y, backward dx and dS/dk; the
//           backward pass of cema_kernel the gradients of the parameters. Here only what omega adds, a thread per
//           channel. The last state comes from cema.cu.
// Traffic   that of fft_conv; besides, for the whole batch, k written and read once (backward also dS/dk), with 2 N FMA
//           per step of a channel (backward 6 N). Backward a row of the batch costs three transforms whatever N is,
//           where the scan takes 20 N FMA per element; not measured yet.
// Numerics  those of fft_conv and cema_kernel: y_t depends on later x by rounding alone. sigmoid(alpha) as it is,
// however
//           small. Deterministic.
// Limits    those of fft_conv and cema_kernel. A NaN or inf spreads over its row and channel, backwards in time too.
#include "core/portable.cuh"
#include "ops/cema_fft.cuh"
#include "ops/cema_fft.h"

namespace megalodon::cuda {
namespace {

constexpr int kThreads = 128;

// k_0 += omega.
template <class A>
__global__ void __launch_bounds__(kThreads) cema_fft_omega_kernel(A* k, const A* omega, int64_t L, int64_t D) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (d < D) k[d * L] += omega[d];
}

// domega = dS/dk_0, 0 where there is no step.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_fft_omega_gradient_kernel(const A* dk, A* domega, int64_t L, int64_t D) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (d < D) domega[d] = L > 0 ? dk[d * L] : A(0);
}

dim3 blocks_of(int64_t D) { return dim3(static_cast<unsigned>(ceil_div(D, kThreads))); }

void* at(void* workspace, int64_t offset) { return static_cast<char*>(workspace) + offset; }

// Args is either of the two: what cema_kernel takes of it.
template <class Kernel, class Args>
Kernel kernel_args(const Args& args) {
  Kernel kernel{};
  kernel.dtype = stat_dtype(args.dtype);
  kernel.alpha = args.alpha;
  kernel.delta = args.delta;
  kernel.theta = args.theta;
  kernel.gamma = args.gamma;
  kernel.D = args.D;
  kernel.N = args.N;
  kernel.L = args.sequences.length;
  return kernel;
}

template <class Conv, class Args>
Conv conv_args(const Args& args, const CemaFftCudaRoom& room) {
  Conv conv{};
  conv.dtype = args.dtype;
  conv.x = args.x;
  conv.k = at(args.workspace, room.response);
  conv.workspace = at(args.workspace, room.rest);
  conv.B = args.sequences.count;
  conv.L = args.sequences.length;
  conv.D = args.D;
  return conv;
}

template <class Args>
void make_response(const Args& args, const CemaFftCudaRoom& room, void* stream) {
  if (args.sequences.length == 0) return;
  auto kernel = kernel_args<CemaKernelForward>(args);
  kernel.k = at(args.workspace, room.response);
  cema_kernel_forward(kernel, stream);
  visit_stat(kernel.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    launch({"cema_fft_omega", blocks_of(args.D), dim3(kThreads), 0, stream}, cema_fft_omega_kernel<A>,
           static_cast<A*>(kernel.k), static_cast<const A*>(args.omega), args.sequences.length, args.D);
  });
}

}  // namespace

void cema_fft_output(const CemaForward& args, void* stream) {
  const CemaFftCudaRoom room = args.transform_room();
  make_response(args, room, stream);
  auto conv = conv_args<FftConvForward>(args, room);
  conv.y = args.y;
  fft_conv_forward(conv, stream);
}

void cema_fft_gradients(const CemaBackward& args, void* stream) {
  const CemaFftCudaRoom room = args.transform_room();
  make_response(args, room, stream);
  auto conv = conv_args<FftConvBackward>(args, room);
  conv.dy = args.dy;
  conv.dx = args.dx;
  conv.dk = at(args.workspace, room.gradient);
  fft_conv_backward(conv, stream);
  auto kernel = kernel_args<CemaKernelBackward>(args);
  kernel.dk = conv.dk;
  kernel.dalpha = args.dalpha;
  kernel.ddelta = args.ddelta;
  kernel.dtheta = args.dtheta;
  kernel.dgamma = args.dgamma;
  kernel.workspace = conv.workspace;
  cema_kernel_backward(kernel, stream);
  visit_stat(kernel.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    launch({"cema_fft_omega_gradient", blocks_of(args.D), dim3(kThreads), 0, stream}, cema_fft_omega_gradient_kernel<A>,
           static_cast<const A*>(conv.dk), static_cast<A*>(args.domega), args.sequences.length, args.D);
  });
}

}  // namespace megalodon::cuda

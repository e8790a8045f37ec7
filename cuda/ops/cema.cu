// cema on the GPU, by the recurrence ("scan", which is also "auto"). Not yet run on a GPU.
//
// Long rows of 16-bit activations go by matrix instructions (cema_mma.cu). "fft" is by transforms (cema_fft.cu) but for
// the last state, and is the scan where h0, dh or cu_seqlens is given (ops/cema_fft.h).
//
// Computes  h_t = a x_t + q h_(t-1), y_t = Re sum_n g_n h_(t,n) + omega x_t and its gradients (ops/cema.h).
// Layout    x, y, dy, dx [B, L, D]; parameters [D, N], [D], [D, N, 2]; states [B, D, N, 2]; all compact.
//           Packed: x, y, dy, dx [1, T, D]; states [segments, D, N, 2].
// Mapping   a block takes a tile of channels (128 / lanes; 1 to 8 lanes share the wavelets of a channel, four each, in
//           registers) and walks through pieces of time (cema_scan.cuh), which are whole sequences or, if there are
//           too few blocks for a GPU, cut from them (ops/cema_cut.h). If they are cut: the states they end with, begun
//           with zeros; the states they begin with, one after the other; then the walk. If there are many pieces, a
//           block takes several. Backward, two walks side by side: the adjoint gives dx, dh0 and dS/da; the state
//           with its derivative by q gives the other gradients going forward, so that no states are kept or made again.
//           A few steps (decoding) are one kernel: a lane per wavelet.
// Traffic   forward 2 elements moved and 6 N FMA per element, backward 5 and 20 N (up to 4 N and 14 N more, and the
//           inputs once more, where sequences are cut): compute-bound from about N = 8 on, so that looking back for a
//           piece's state in one pass would save only what is not the limit. bf16 and f16, N <= 16 and L >= 512 (in a
//           packed row 256 on average) branch off in cema_forward: y and h by matrix instructions. Backward, dx does so
//           where there is neither h0 nor dh, as in training, and the adjoint's 6 N FMA are saved; gradients of
//           parameters are still the scan's 14 N.
// Numerics  coefficients, and what goes from piece to piece, in double. A walk is in float (double for float64), its
//           states corrected every 128 steps, so that the rounding of q does not add up. Gradients of parameters: sums
//           in float over 128 steps, in double over those, over pieces and the parts of them, in a fixed order. A few
//           steps in double.
// Limits    N > 32: groups of 32 wavelets, one after the other, by way of sums in the workspace. sigmoid(alpha)
//           below 1e-20 counts as 1e-20. Subnormal numbers are kept: they are as fast as others.
#include "core/reduce.cuh"
#include "ops/cema.h"
#include "ops/cema_fft.cuh"
#include "ops/cema_mma.cuh"
#include "ops/cema_scan.cuh"
#include "ops/cema_short.cuh"
#include "ops/cema_states.cuh"

namespace megalodon::cuda {
namespace {

// ---- from the sums to the gradients of the raw parameters -----------------------------------------------------------

template <class A>
struct GradientArgs {
  const double* sums;  // [count, block_sums]: see kSumQ
  int64_t count, block_sums, D;
  bool has_input_sums;  // if not, dS/da is Re (g dS/dg) / a: from h0 = 0 on, y is in proportion to both, and dh is 0
  A *dalpha, *ddelta, *dtheta, *dgamma, *domega;
};

// A warp per channel, a lane per wavelet.
template <class A>
__global__ void __launch_bounds__(kThreads) cema_gradients_kernel(GradientArgs<A> args, Parameters<A> parameters) {
  const int64_t N = parameters.N, row = args.D * N;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = lane_index();
  if (d >= args.D) return;  // a whole warp
  const auto sum = [&](int64_t i) {
    double total = 0;
    for (int64_t p = 0; p < args.count; ++p) total += args.sums[p * args.block_sums + i];
    return total;
  };
  const double scale = gamma_scale(N);
  double dtheta = 0;
  for (int64_t n = lane; n < N; n += 32) {
    const int64_t i = d * N + n;
    const Wavelet w = parameters.wavelet(d, n);
    const double a = input_of(w), output_re = sum(kSumG * row + i), output_im = sum((kSumG + 1) * row + i);
    const Pair<double> dq{a * sum(kSumQ * row + i), -a * sum((kSumQ + 1) * row + i)};
    const Pair<double> dg{a * output_re, -a * output_im};
    const Complex gamma = parameters.gamma_of(d, n);
    const double da =
        args.has_input_sums ? sum(kSumA * row + i) : scale * (gamma.re * output_re - gamma.im * output_im);
    const Pair<double> u = direction_of(w);
    const double drho = dq.re * u.re + dq.im * u.im, dphi = w.rho * (dq.im * u.re - dq.re * u.im);
    args.dalpha[i] = static_cast<A>(w.alpha.slope() * (da - w.delta.value * drho));
    args.ddelta[i] = static_cast<A>(-(w.alpha.value * w.delta.slope() * drho));
    args.dgamma[2 * i] = static_cast<A>(scale * dg.re);
    args.dgamma[2 * i + 1] = static_cast<A>(scale * dg.im);
    dtheta += static_cast<double>(n + 1) / static_cast<double>(N) * kTwoPi * w.theta.slope() * dphi;
  }
  dtheta = warp_sum(dtheta);
  if (lane > 0) return;
  args.dtheta[d] = static_cast<A>(dtheta);
  args.domega[d] = static_cast<A>(sum(kSumOmega * row + d));
}

// ---- launchers ------------------------------------------------------------------------------------------------------

unsigned blocks_of(int64_t wavelets) { return static_cast<unsigned>(ceil_div(wavelets, kThreads)); }

template <class A>
dim3 carry_grid(const CarryArgs<A>& args, int64_t wavelets) {
  return dim3(blocks_of(wavelets), static_cast<unsigned>(args.parts.parts));
}

template <class A, class Args>
void make_table(const Args& args, double* table, void* stream) {
  launch({"cema_table", dim3(blocks_of(args.D * args.N)), dim3(kThreads), 0, stream}, cema_table_kernel<A>,
         Parameters<A>::of(args), args.D, table);
}

// What the scans have in common.
template <class T, class Args>
ScanArgs<T> scan_args(const Args& args, const Plan& plan) {
  ScanArgs<T> scan{};
  scan.omega = static_cast<const stat_t<T>*>(args.omega);
  scan.D = args.D;
  scan.N = args.N;
  scan.cut = plan.cut;
  return scan;
}

// Calls body(constant lanes).
template <class Body>
void visit_lanes(int64_t lanes, Body&& body) {
  if (lanes == 1) return body(std::integral_constant<int, 1>{});
  if (lanes == 2) return body(std::integral_constant<int, 2>{});
  if (lanes == 4) return body(std::integral_constant<int, 4>{});
  static_assert(Plan::kMostLanes == 8);
  body(std::integral_constant<int, 8>{});
}

template <class T, int kLanes>
void forward(const CemaForward& args, const Plan& plan, void* stream) {
  using A = stat_t<T>;
  const int64_t wavelets = args.D * args.N;
  auto* carries = static_cast<double*>(args.workspace);  // first, since they are read 16 bytes at a time
  double* table = carries + plan.cut.places() * wavelets * 2;
  make_table<A>(args, table, stream);
  ScanArgs<T> scan = scan_args<T>(args, plan);
  scan.in = static_cast<const T*>(args.x);
  scan.out = static_cast<T*>(args.y);
  scan.table = table;
  scan.start = static_cast<const A*>(args.h0);
  scan.last = static_cast<A*>(args.h);
  scan.carries = carries;
  if (Plan::has_groups(args.N)) scan.partial = reinterpret_cast<A*>(table + kTableRows * wavelets);
  scan.packed = can_pack<T>(args.D, args.x, args.y);
  const int64_t shared = Tiles<T, kLanes>::bytes(1);
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts()));
  const auto walk = [&](auto kernel, const char* name) {
    for (scan.first = 0; scan.first < args.N; scan.first += kEach * kLanes) {
      launch({name, grid, dim3(kThreads), shared, stream}, kernel, scan);
    }
  };
  if (plan.cut.cuts()) {
    walk(cema_forward_kernel<T, kLanes, true>, "cema_forward_ends");
    const auto carry = CarryArgs<A>::of(plan.cut, scan.start, scan.carries);
    launch({"cema_forward_carry", carry_grid(carry, wavelets), dim3(kThreads), 0, stream}, cema_forward_carry_kernel<A>,
           carry, Parameters<A>::of(args), args.D);
  }
  walk(cema_forward_kernel<T, kLanes, false>, "cema_forward");
}

// h alone, of rows and where h0 is 0: the ends of all pieces, put together.
template <class T, int kLanes>
void last_state(const CemaForward& args, const Plan& plan, void* stream) {
  using A = stat_t<T>;
  const int64_t wavelets = args.D * args.N;
  auto* ends = static_cast<double*>(args.workspace);
  double* table = ends + plan.cut.ends() * wavelets * 2;
  make_table<A>(args, table, stream);
  ScanArgs<T> scan = scan_args<T>(args, plan);
  scan.keeps_ends = true;
  scan.in = static_cast<const T*>(args.x);
  scan.table = table;
  scan.carries = ends;
  scan.packed = can_pack<T>(args.D, args.x);
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts()));
  for (scan.first = 0; scan.first < args.N; scan.first += kEach * kLanes) {
    launch({"cema_last_ends", grid, dim3(kThreads), Tiles<T, kLanes>::bytes(1), stream},
           cema_forward_kernel<T, kLanes, true>, scan);
  }
  launch({"cema_last_state", dim3(blocks_of(args.sequences.count * wavelets)), dim3(kThreads), 0, stream},
         cema_last_state_kernel<A>, static_cast<const double*>(ends), Parameters<A>::of(args), static_cast<A*>(args.h),
         plan.cut, args.D);
}

// ---- by matrix instructions (cema_mma.cu) ---------------------------------------------------------------------------

// A walk over `in`, forward or back. The workspace begins with the carries, since they are read 16 bytes at a time.
template <class Args>
void walk_by_products(const Args& args, bool reverse, const void* in, void* out, const void* start, void* last,
                      void* stream) {
  const auto parameters = Parameters<float>::of(args);
  MmaWalk walk{};
  walk.dtype = args.dtype;
  walk.reverse = reverse;
  walk.in = in;
  walk.out = out;
  walk.start = static_cast<const float*>(start);
  walk.last = static_cast<float*>(last);
  walk.carries = static_cast<double*>(args.workspace);
  walk.D = args.D;
  walk.N = args.N;
  walk.plan = MmaPlan::of(args.sequences, args.D);
  const CemaCut& cut = walk.plan.cut;
  auto* table = reinterpret_cast<unsigned char*>(walk.carries + cut.places() * args.D * args.N * 2);
  walk.table = table;
  cema_mma_table(parameters, static_cast<const float*>(args.omega), args.D, reverse, table, stream);
  if (cut.cuts()) {
    cema_mma_ends(walk, stream);
    const auto carry = CarryArgs<float>::of(cut, walk.start, walk.carries);
    launch({"cema_carry", carry_grid(carry, args.D * args.N), dim3(kThreads), 0, stream},
           reverse ? cema_adjoint_carry_kernel<float> : cema_forward_carry_kernel<float>, carry, parameters, args.D);
  }
  cema_mma_walk(walk, stream);
}

template <class T, int kLanes>
void backward(const CemaBackward& args, const Plan& plan, void* stream) {
  using A = stat_t<T>;
  const int64_t wavelets = args.D * args.N;
  const bool by_products = args.by_products();
  if (by_products) walk_by_products(args, true, args.dy, args.dx, args.dh, nullptr, stream);
  const unsigned scans = by_products ? 1 : 2;
  auto* carries = reinterpret_cast<double*>(static_cast<char*>(args.workspace) + args.product_bytes());
  double* table = carries + plan.cut.places() * wavelets * 6;
  make_table<A>(args, table, stream);
  ScanArgs<T> adjoint = scan_args<T>(args, plan);
  adjoint.table = table;
  adjoint.block_sums = args.cuda_sums();
  adjoint.packed = can_pack<T>(args.D, args.x, args.dy, args.dx);
  ScanArgs<T> sensitivity = adjoint;
  adjoint.carries = carries;
  sensitivity.carries = carries + plan.cut.places() * wavelets * 2;
  double* sums = table + kTableRows * wavelets;
  double* total = sums + plan.parts() * args.cuda_sums();
  adjoint.sums = sensitivity.sums = sums;
  if (Plan::has_groups(args.N)) adjoint.partial = reinterpret_cast<A*>(total + args.cuda_sums());
  adjoint.in = sensitivity.other = static_cast<const T*>(args.dy);
  adjoint.other = sensitivity.in = static_cast<const T*>(args.x);
  adjoint.out = static_cast<T*>(args.dx);
  adjoint.start = sensitivity.cotangent = static_cast<const A*>(args.dh);
  adjoint.last = static_cast<A*>(args.dh0);
  sensitivity.start = static_cast<const A*>(args.h0);
  const int64_t shared = Tiles<T, kLanes>::bytes(2);
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts()), scans);
  const auto walk = [&](auto kernel, const char* name) {
    for (int64_t first = 0; first < args.N; first += kEach * kLanes) {
      adjoint.first = sensitivity.first = first;
      launch({name, grid, dim3(kThreads), shared, stream}, kernel, sensitivity, adjoint);
    }
  };
  if (plan.cut.cuts()) {
    walk(cema_backward_kernel<T, kLanes, true>, "cema_backward_ends");
    const auto carry = CarryArgs<A>::of(plan.cut, sensitivity.start, sensitivity.carries);
    dim3 carries_grid = carry_grid(carry, wavelets);
    carries_grid.z = scans;
    launch({"cema_backward_carry", carries_grid, dim3(kThreads), 0, stream}, cema_backward_carry_kernel<A>, carry,
           CarryArgs<A>::of(plan.cut, adjoint.start, adjoint.carries), Parameters<A>::of(args), args.D);
  }
  walk(cema_backward_kernel<T, kLanes, false>, "cema_backward");
  const bool few = plan.parts() <= Plan::kFewParts;
  if (!few) add_parts(sums, plan.parts(), args.cuda_sums(), total, stream);
  const GradientArgs<A> gradients{few ? sums : total,
                                  few ? plan.parts() : 1,
                                  args.cuda_sums(),
                                  args.D,
                                  !by_products,
                                  static_cast<A*>(args.dalpha),
                                  static_cast<A*>(args.ddelta),
                                  static_cast<A*>(args.dtheta),
                                  static_cast<A*>(args.dgamma),
                                  static_cast<A*>(args.domega)};
  launch({"cema_gradients", dim3(static_cast<unsigned>(ceil_div(args.D, kThreads / 32))), dim3(kThreads), 0, stream},
         cema_gradients_kernel<A>, gradients, Parameters<A>::of(args));
}

}  // namespace

void cema_forward(const CemaForward& args, void* stream) {
  if (args.sequences.count == 0 || args.D == 0) return;
  const bool by_transforms = args.by_transforms();
  if (by_transforms) cema_fft_output(args, stream);
  if (!by_transforms && args.by_products())
    return walk_by_products(args, false, args.x, args.y, args.h0, args.h, stream);
  const Plan plan = Plan::of(args);
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!by_transforms && args.is_short()) return forward_short<T>(args, stream);
    visit_lanes(plan.lanes, [&](auto lanes) {
      by_transforms ? last_state<T, lanes.value>(args, plan, stream) : forward<T, lanes.value>(args, plan, stream);
    });
  });
}

void cema_backward(const CemaBackward& args, void* stream) {
  if (args.D == 0) return;
  if (args.by_transforms()) return cema_fft_gradients(args, stream);
  const Plan plan = Plan::of(args);
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_lanes(plan.lanes, [&](auto lanes) { backward<T, lanes.value>(args, plan, stream); });
  });
}

}  // namespace megalodon::cuda

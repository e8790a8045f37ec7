// The gradients of cema on the GPU, by the recurrence ("scan", which is also "auto"). Not yet run on a GPU.
//
// "fft" is by transforms (cema_fft.cu), and is the scan where h0, dh or cu_seqlens is given (ops/cema_fft.h).
//
// Computes  the gradients of ops/cema.h.
// Layout    as in cema.cu.
// Mapping   as in cema.cu, and two walks side by side: the adjoint gives dx, dh0 and dS/da; the state with its
//           derivative by q gives the other gradients going forward, so that no states are kept or made again.
// Traffic   5 elements moved and 20 N FMA per element (up to 14 N more, and the inputs once more, where sequences are
//           cut): compute-bound. Where the forward pass goes by matrix instructions, dx does so too if there is neither
//           h0 nor dh, as in training, and the adjoint's 6 N FMA are saved; gradients of parameters are still the
//           scan's 14 N.
// Numerics  as in cema.cu. Gradients of parameters: sums in float over 128 steps, in double over those, over pieces and
//           the parts of them, in a fixed order.
// Limits    as in cema.cu.
#include "core/reduce.cuh"
#include "ops/cema_backward.cuh"
#include "ops/cema_fft.cuh"
#include "ops/cema_launch.cuh"

namespace megalodon::cuda {
namespace {

template <class T, int kLanes>
void backward(const CemaBackward& args, const Plan& plan, void* stream) {
  using A = stat_t<T>;
  const int64_t wavelets = args.D * args.N;
  const bool by_products = args.by_products();
  if (by_products) {
    walk_by_products(args, true, args.dy, args.dx, args.dh, nullptr, cema_adjoint_carry_kernel<float>, stream);
  }
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

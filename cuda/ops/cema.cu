// cema on the GPU, by the recurrence ("scan", which is also "auto"); its gradients: cema_backward.cu. Not yet run on a
// GPU.
//
// Long rows of 16-bit activations go by matrix instructions (cema_mma.cu). "fft" is by transforms (cema_fft.cu) but for
// the last state, and is the scan where h0, dh or cu_seqlens is given (ops/cema_fft.h).
//
// Computes  h_t = a x_t + q h_(t-1), y_t = Re sum_n g_n h_(t,n) + omega x_t (ops/cema.h).
// Layout    x, y, dy, dx [B, L, D]; parameters [D, N], [D], [D, N, 2]; states [B, D, N, 2]; all compact. Packed: x, y,
//           dy, dx [1, T, D]; states [segments, D, N, 2].
// Mapping   a block takes a tile of channels (128 / lanes; 1 to 8 lanes share the wavelets of a channel, four each, in
//           registers) and walks through pieces of time (cema_scan.cuh), which are whole sequences or, if there are
//           too few blocks for a GPU, cut from them (ops/cema_cut.h). If they are cut: the states they end with, begun
//           with zeros; the states they begin with, one after the other; then the walk. If there are many pieces, a
//           block takes several. A few steps (decoding) are one kernel: a lane per wavelet.
// Traffic   2 elements moved and 6 N FMA per element (up to 4 N more, and the inputs once more, where sequences are
//           cut): compute-bound from about N = 8 on, so that looking back for a piece's state in one pass would save
//           only what is not the limit. bf16 and f16, N <= 16 and L >= 512 (in a packed row 256 on average) branch off
//           in cema_forward: y and h by matrix instructions.
// Numerics  coefficients, and what goes from piece to piece, in double. A walk is in float (double for float64), its
//           states corrected every 128 steps, so that the rounding of q does not add up. A few steps in double.
// Limits    N > 32: groups of 32 wavelets, one after the other, by way of sums in the workspace. sigmoid(alpha)
//           below 1e-20 counts as 1e-20. Subnormal numbers are kept: they are as fast as others.
#include "ops/cema.h"
#include "ops/cema_fft.cuh"
#include "ops/cema_launch.cuh"
#include "ops/cema_short.cuh"

namespace megalodon::cuda {
namespace {

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

}  // namespace

void cema_forward(const CemaForward& args, void* stream) {
  if (args.sequences.count == 0 || args.D == 0) return;
  const bool by_transforms = args.by_transforms();
  if (by_transforms) cema_fft_output(args, stream);
  if (!by_transforms && args.by_products()) {
    return walk_by_products(args, false, args.x, args.y, args.h0, args.h, cema_forward_carry_kernel<float>, stream);
  }
  const Plan plan = Plan::of(args);
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!by_transforms && args.is_short()) return forward_short<T>(args, stream);
    visit_lanes(plan.lanes, [&](auto lanes) {
      by_transforms ? last_state<T, lanes.value>(args, plan, stream) : forward<T, lanes.value>(args, plan, stream);
    });
  });
}

}  // namespace megalodon::cuda

// What the launchers of cema, forward and backward, have in common.
#pragma once

#include "ops/cema.h"
#include "ops/cema_mma.cuh"
#include "ops/cema_scan.cuh"
#include "ops/cema_states.cuh"

namespace megalodon::cuda {
namespace {

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

// ---- by matrix instructions (cema_mma.cu) ---------------------------------------------------------------------------

// A walk over `in`, forward or back. The workspace begins with the carries, since they are read 16 bytes at a time.
template <class Args, class CarryKernel>
void walk_by_products(const Args& args, bool reverse, const void* in, void* out, const void* start, void* last,
                      CarryKernel carry_kernel, void* stream) {
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
    launch({"cema_carry", carry_grid(carry, args.D * args.N), dim3(kThreads), 0, stream}, carry_kernel, carry,
           parameters, args.D);
  }
  cema_mma_walk(walk, stream);
}

}  // namespace
}  // namespace megalodon::cuda

// timestep_norm on the GPU. Not yet run on a GPU.
//
// Computes  timestep norm (arXiv 2404.08801, as the released code has it) and its gradients (ops/timestep_norm.h).
// Layout    x, y, dy, dx (tokens, D); states (sequences, G); step_mean, step_rstd (tokens, G); mask (tokens); all
//           compact. The tokens of a sequence, a row or a segment of a packed one, are adjacent.
// Mapping   a tile is 32 steps of a sequence, of as many groups as fill a warp with 16-byte packs (64 channels of
//           bfloat16: 4 groups, 8 lanes each); a block of 8 warps is given one by ticket, a warp holds 4 of its steps.
//           What the tiles before it (backward: after it) do to the recurrence comes by a look-back
//           (core/look_back.cuh), for which a lane is a step and a warp a group; padded steps are left out. Then the
//           steps are finished from registers. Backward, a tile adds its sums of dweight and dbias to one of a few
//           parts, which stay in L2; tiles of a part take turns. Tiles of a packed row are numbered without knowing
//           where its segments begin (core/sequences.h): some blocks find that their number is none.
// Traffic   forward 2, backward 3 elements moved per element, 10 and 25 FLOPs; step_mean and step_rstd 8 bytes per
//           group; slots 32 bytes per group and tile, read up to 31 times from L2: memory-bound.
// Numerics  a step is measured from its group's first channel, then its variance from its mean, in float (double for
//           float64). The recurrences are in double, and sums: those of (mu - m) and s + (mu - m)^2 with m the mean of
//           the first of the steps added, which is one of them, so that at most a factor of their number (32, then
//           1024) cancels; whole windows are merged as in Welford's recurrence. Backward the adjoints over n, bM and
//           bV, for which aM, aV <- c1 ... becomes a sum: bV -= p, bM -= q + e bV with p = r^3 sum(u (x - M')) / (2 n),
//           q = r sum(u) / n, e = 2 (mu - M') / (n - 1). dweight, dbias: the parts are sums in float, added in order.
// Limits    2^31 tiles. Groups of no multiple of 16 bytes, or not so aligned, go element by element. Groups beyond 32
//           packs (256 channels of bfloat16) are read again: forward three times, backward twice.
#include "core/reduce.cuh"
#include "ops/timestep_norm.h"
#include "ops/timestep_norm_backward.cuh"
#include "ops/timestep_norm_forward.cuh"

namespace megalodon::cuda {
namespace {

template <class T, int V>
void forward(const TimestepNormForward& args, void* stream) {
  const Plan plan = Plan::of(args.chains(), args.K(), V);
  if (plan.looks_back) clear(args.workspace, args.workspace_bytes(true), stream);
  launch({"timestep_norm_forward", dim3(static_cast<unsigned>(plan.blocks())), dim3(kThreads), 0, stream},
         timestep_norm_forward_kernel<T, V>, args, plan);
}

template <class T, int V>
void backward(const TimestepNormBackward& args, void* stream) {
  using A = stat_t<T>;
  const TimestepNormChains chains = args.chains();
  const Plan plan = Plan::of(chains, args.K(), V);
  const auto room = TimestepNormBackwardRoom::of(chains, args.sequences.count, args.D, args.padding_mask != nullptr,
                                                 stat_dtype(args.dtype));
  auto* memory = static_cast<char*>(args.workspace);
  if (args.sequences.count > 0) {
    // The first number of a part may be no tile: then the sums of the others are added to these.
    clear(memory, args.sequences.packed ? room.bytes : room.counts, stream);
    if (args.padding_mask != nullptr) {
      launch({"timestep_norm_count", dim3(static_cast<unsigned>(args.sequences.count)), dim3(1024), 0, stream},
             timestep_norm_count_kernel<int64_t>, args.padding_mask, args.sequences,
             reinterpret_cast<int64_t*>(memory + room.counts));
    }
    launch({"timestep_norm_backward", dim3(static_cast<unsigned>(plan.blocks())), dim3(kThreads), 0, stream},
           timestep_norm_backward_kernel<T, V>, args, plan, room);
  }
  const A* sums = reinterpret_cast<const A*>(memory + room.sums);
  add_parts(sums, room.parts, args.D, static_cast<A*>(args.dweight), stream);
  add_parts(sums + room.parts * args.D, room.parts, args.D, static_cast<A*>(args.dbias), stream);
}

}  // namespace

void timestep_norm_forward(const TimestepNormForward& args, void* stream) {
  if (args.sequences.count == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = args.K() % kPackOf<T> == 0 && can_pack<T>(args.D, args.x, args.weight, args.bias, args.y);
    packed ? forward<T, kPackOf<T>>(args, stream) : forward<T, 1>(args, stream);
  });
}

void timestep_norm_backward(const TimestepNormBackward& args, void* stream) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = args.K() % kPackOf<T> == 0 && can_pack<T>(args.D, args.dy, args.x, args.weight, args.dx);
    packed ? backward<T, kPackOf<T>>(args, stream) : backward<T, 1>(args, stream);
  });
}

}  // namespace megalodon::cuda

// fft_conv on the GPU. Not yet run on a GPU.
//
// Computes  y_t = sum over s <= t of k_s x_(t-s) per channel, and its gradients, by a transform of H = 2^m >= L points
//           that does not wrap around (core/fft.cuh; ops/fft_conv.h).
// Layout    x, y, dy, dx [B, L, D] as they are; k, dk [D, L] stat; all compact. A group of C neighbouring channels lies
//           side by side at every step, in shared memory and in the workspace.
// Mapping   whole (H <= 8192, backward 4096; float64 2048 and 1024): a block owns a group of channels and a part of the
//           batch (fft_conv_block.cuh). It transforms the group's kernels once and keeps their points in registers; row
//           after row it reads x into the root pass, passes through shared memory, multiplies at the leaves in
//           registers on the way from the last pass to the first of the inverse, and writes y out of the root's
//           inverse. Backward, x and the reversed dy are two such arrays; the points of dk are summed up in registers.
//           split (longer): the first levels of the tree are passes of blocks that own a few neighbouring columns, from
//           x to the workspace (fft_conv_outer.cuh); then a block per subtree does what it does for the whole, in
//           place; then back. Channel groups and rows are worked on in slices.
// Traffic   whole: x and y once (backward x, dy, dx), in runs of C channels, 2 to 64: the longer the row, the fewer
//           fit, and below 32 bytes the second-level cache moves more than is used. 2 ceil(m / 3) passes (backward 3
//           ceil(m / 3)) of 16 bytes of shared memory per point, half of it for the root's: that and arithmetic, about
//           10 m operations per point forward, are the limits expected. split: besides, per point 8 bytes (float64 16)
//           written and read twice, for x (backward for dy, and once for x), and for every slice of k.
//           Workspace: 2 H numbers of constants; whole backward, where there are several parts of the batch, D L
//           numbers for each (at most about 132 * 1024 * 16 L / H in all, or two parts); split, up to 256 MiB, but for
//           at least one channel group and row, two arrays (backward four) of at most 256 MiB each, or of one channel.
// Numerics  constants made in double; arithmetic in stat. A transform spreads rounding over its row: y_t depends on
//           later x by rounding alone, at the scale of the row's largest values. dk is summed over the rows of a part
//           in order, then over parts in order: deterministic. Subnormal numbers are kept.
// Limits    a NaN or inf spreads over its row and channel, backwards in time too. Lengths just above a power of two
//           cost as much as the next one. D below C wastes threads. Any L whose arrays fit in memory.
#include "core/reduce.cuh"
#include "ops/fft_conv.h"
#include "ops/fft_conv_block.cuh"
#include "ops/fft_conv_outer.cuh"

namespace megalodon::cuda {
namespace {

template <class A>
constexpr int kForwardThreads = FftConvCudaPlan::most_threads(false, sizeof(A));
template <class A>
constexpr int kBackwardThreads = FftConvCudaPlan::most_threads(true, sizeof(A));

// ---- whole: from and to the tensors ---------------------------------------------------------------------------------

template <class T>
struct WholeArgs {
  using A = stat_t<T>;
  const A* table;
  A scale;  // 1 / H
  int levels, width;
  Parts rows;
  Steps<const A> k;
  Steps<const T> in;  // x, or the reversed dy
  Steps<T> out;       // y, or the reversed dx
  Steps<const T> x;   // backward alone, as what follows
  Steps<A> dk;        // reversed, of every part

  template <int kEach>
  DEVICE BlockFft<A, kEach> fft(Point<A>* z) const {
    return {z, table, 1, levels, width};
  }
  // Of the butterfly's first point and the distance between its points.
  DEVICE int64_t channel(int index) const {
    return (static_cast<int64_t>(blockIdx.x) << width) + (index & ((1 << width) - 1));
  }
  DEVICE int step(int index) const { return index >> width; }
  DEVICE int log_distance() const { return levels - 3; }
};

template <class T>
__global__ void __launch_bounds__(kForwardThreads<stat_t<T>>, 1) fft_conv_forward_kernel(WholeArgs<T> args) {
  using A = stat_t<T>;
  DYNAMIC_SHARED(Point<A>, z);
  const auto fft = args.template fft<kForwardEach<A>>(z);
  convolve<true>(
      fft, args.rows, blockIdx.y, args.scale,
      [&](int i, Point<A>(&v)[8]) { args.k.read(0, args.channel(i), args.step(i), args.log_distance(), v); },
      [&](int64_t b, int i, Point<A>(&v)[8]) {
        args.in.read(b, args.channel(i), args.step(i), args.log_distance(), v);
      },
      [&](int64_t b, int i, const Point<A>(&v)[8]) {
        args.out.write(b, args.channel(i), args.step(i), args.log_distance(), v);
      });
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads<stat_t<T>>, 1) fft_conv_backward_kernel(WholeArgs<T> args) {
  using A = stat_t<T>;
  DYNAMIC_SHARED(Point<A>, z);  // two arrays
  const auto fft = args.template fft<kBackwardEach<A>>(z);
  convolve_backward<true>(
      fft, args.rows, blockIdx.y, args.scale,
      [&](int i, Point<A>(&v)[8]) { args.k.read(0, args.channel(i), args.step(i), args.log_distance(), v); },
      [&](int64_t b, int i, Point<A>(&v)[8]) {
        args.in.read(b, args.channel(i), args.step(i), args.log_distance(), v);
      },
      [&](int64_t b, int i, Point<A>(&v)[8]) { args.x.read(b, args.channel(i), args.step(i), args.log_distance(), v); },
      [&](int64_t b, int i, const Point<A>(&v)[8]) {
        args.out.write(b, args.channel(i), args.step(i), args.log_distance(), v);
      },
      [&](int i, const Point<A>(&v)[8]) {
        args.dk.write(blockIdx.y, args.channel(i), args.step(i), args.log_distance(), v);
      });
}

// ---- split: the subtrees --------------------------------------------------------------------------------------------

// Arrays [slice rows, slice groups, H, C] in the workspace; a block's subtree begins at blockIdx.x times its points.
template <class A>
struct InnerArgs {
  const A* table;
  A scale;  // 1 / H
  int levels, inner, width;
  Parts rows;
  const Point<A>* k;
  Point<A>* in;       // x, becomes y; backward the reversed dy, becomes the reversed dx
  const Point<A>* x;  // backward alone, as what follows
  Point<A>* dk;
  bool adds;  // to dk

  template <int kEach>
  DEVICE BlockFft<A, kEach> fft(Point<A>* z) const {
    const int64_t subtrees = int64_t{1} << (levels - inner);
    return {z, table, subtrees + blockIdx.x % subtrees, inner, width};
  }
  // The points of a butterfly of the subtree's root, in row b of an array.
  DEVICE int64_t begin(int64_t b) const { return (b * gridDim.x + blockIdx.x) << (inner + width); }
  DEVICE unsigned distance() const { return 1u << (inner + width - 3); }
  DEVICE void read(const Point<A>* array, int64_t b, int index, Point<A> (&v)[8]) const {
    read_points(array + begin(b), static_cast<unsigned>(index), distance(), v);
  }
  DEVICE void write(Point<A>* array, int64_t b, int index, const Point<A> (&v)[8]) const {
    write_points(array + begin(b), static_cast<unsigned>(index), distance(), v);
  }
};

template <class A>
__global__ void __launch_bounds__(kOuterThreads, 1) fft_conv_inner_forward_kernel(InnerArgs<A> args) {
  DYNAMIC_SHARED(Point<A>, z);
  const auto fft = args.template fft<kForwardEach<A>>(z);
  convolve<false>(
      fft, args.rows, blockIdx.y, args.scale, [&](int i, Point<A>(&v)[8]) { args.read(args.k, 0, i, v); },
      [&](int64_t b, int i, Point<A>(&v)[8]) { args.read(args.in, b, i, v); },
      [&](int64_t b, int i, const Point<A>(&v)[8]) { args.write(args.in, b, i, v); });
}

template <class A>
__global__ void __launch_bounds__(kBackwardThreads<A>, 1) fft_conv_inner_backward_kernel(InnerArgs<A> args) {
  DYNAMIC_SHARED(Point<A>, z);  // two arrays
  const auto fft = args.template fft<kBackwardEach<A>>(z);
  convolve_backward<false>(
      fft, args.rows, blockIdx.y, args.scale, [&](int i, Point<A>(&v)[8]) { args.read(args.k, 0, i, v); },
      [&](int64_t b, int i, Point<A>(&v)[8]) { args.read(args.in, b, i, v); },
      [&](int64_t b, int i, Point<A>(&v)[8]) { args.read(args.x, b, i, v); },
      [&](int64_t b, int i, const Point<A>(&v)[8]) { args.write(args.in, b, i, v); },
      [&](int i, const Point<A>(&v)[8]) {
        Point<A> sum[8] = {};
        if (args.adds) args.read(args.dk, 0, i, sum);
        UNROLL
        for (int m = 0; m < 8; ++m) sum[m] = sum[m] + v[m];
        args.write(args.dk, 0, i, sum);
      });
}

// ---- launchers ------------------------------------------------------------------------------------------------------

template <class A>
struct Workspace {
  A* table;
  A* rest;

  Workspace(void* workspace, const FftConvCudaPlan& plan) {
    table = reinterpret_cast<A*>(round_up(reinterpret_cast<int64_t>(workspace), FftConvCudaPlan::kAlignment));
    rest = table + plan.table_bytes() / plan.stat;
  }
};

unsigned unsigned_of(int64_t n) { return static_cast<unsigned>(n); }

template <class T>
void forward_whole(const FftConvForward& args, const FftConvCudaPlan& plan, void* stream) {
  using A = stat_t<T>;
  const Workspace<A> workspace(args.workspace, plan);
  fill_fft_table(workspace.table, plan.levels, stream);
  WholeArgs<T> whole{};
  whole.table = workspace.table;
  whole.scale = A(1) / static_cast<A>(plan.points());
  whole.levels = plan.levels;
  whole.width = plan.width;
  whole.rows = {args.B, plan.parts};
  whole.k = kernel_steps_of(static_cast<const A*>(args.k), args.L, args.D);
  whole.in = steps_of(static_cast<const T*>(args.x), args.L, args.D);
  whole.out = steps_of(static_cast<T*>(args.y), args.L, args.D);
  launch({"fft_conv_forward", dim3(unsigned_of(plan.groups), unsigned_of(plan.parts)),
          dim3(unsigned_of(plan.threads())), plan.group_bytes(), stream},
         fft_conv_forward_kernel<T>, whole);
}

template <class T>
void backward_whole(const FftConvBackward& args, const FftConvCudaPlan& plan, void* stream) {
  using A = stat_t<T>;
  const Workspace<A> workspace(args.workspace, plan);
  fill_fft_table(workspace.table, plan.levels, stream);
  A* const dk = static_cast<A*>(args.dk);
  WholeArgs<T> whole{};
  whole.table = workspace.table;
  whole.scale = A(1) / static_cast<A>(plan.points());
  whole.levels = plan.levels;
  whole.width = plan.width;
  whole.rows = {args.B, plan.parts};
  whole.k = kernel_steps_of(static_cast<const A*>(args.k), args.L, args.D);
  whole.in = reversed(steps_of(static_cast<const T*>(args.dy), args.L, args.D));
  whole.out = reversed(steps_of(static_cast<T*>(args.dx), args.L, args.D));
  whole.x = steps_of(static_cast<const T*>(args.x), args.L, args.D);
  whole.dk = reversed(kernel_steps_of(plan.parts > 1 ? workspace.rest : dk, args.L, args.D));
  launch({"fft_conv_backward", dim3(unsigned_of(plan.groups), unsigned_of(plan.parts)),
          dim3(unsigned_of(plan.threads())), 2 * plan.group_bytes(), stream},
         fft_conv_backward_kernel<T>, whole);
  if (plan.parts > 1) add_parts(workspace.rest, plan.parts, args.D * args.L, dk, stream);
}

// The passes above the subtrees of a slice of channel groups.
template <class A>
struct Outer {
  const FftConvCudaPlan& plan;
  const A* table;
  void* stream;
  int64_t group, groups;  // the first of the slice, how many

  int passes() const { return static_cast<int>(ceil_div(plan.levels - plan.inner, fft_conv_cuda_limits.outer_levels)); }
  int depth(int pass) const { return (plan.levels - plan.inner) * pass / passes(); }

  template <class T>
  void run(const char* name, void (*kernel)(OuterArgs<T>), int pass, const Steps<T>& steps, int64_t row, int64_t rows,
           Point<A>* points) const {
    constexpr int64_t kBlockPoints = 8 * kForwardEach<A> * kOuterThreads;
    static_assert(kBlockPoints == FftConvCudaPlan::block_points(sizeof(A)));
    OuterArgs<T> args{};
    args.table = table;
    args.levels = plan.levels;
    args.width = plan.width;
    args.depth = depth(pass);
    args.pass = depth(pass + 1) - args.depth;
    while (int64_t{1} << (args.pass + args.columns) < kBlockPoints) ++args.columns;
    args.groups = groups;
    args.row = row;
    args.channel = group << plan.width;
    args.steps = steps;
    args.points = points;
    launch({name, dim3(unsigned_of(rows * groups * plan.group_points() / kBlockPoints)), dim3(kOuterThreads),
            kBlockPoints * static_cast<int64_t>(sizeof(Point<A>)), stream},
           kernel, args);
  }
  // Rows of steps to points, and back.
  template <class T>
  void split(const Steps<const T>& steps, int64_t row, int64_t rows, Point<A>* points) const {
    for (int p = 0; p < passes(); ++p) {
      run("fft_conv_outer", fft_conv_outer_kernel<T>, p, steps, row, rows, points);
    }
  }
  template <class T>
  void join(const Steps<T>& steps, int64_t row, int64_t rows, Point<A>* points) const {
    for (int p = passes() - 1; p >= 0; --p) {
      run("fft_conv_outer_inverse", fft_conv_outer_inverse_kernel<T>, p, steps, row, rows, points);
    }
  }
};

template <class A>
InnerArgs<A> inner_args(const FftConvCudaPlan& plan, const A* table, int64_t rows, const Point<A>* k, Point<A>* in) {
  InnerArgs<A> inner{};
  inner.table = table;
  inner.scale = A(1) / static_cast<A>(plan.points());
  inner.levels = plan.levels;
  inner.inner = plan.inner;
  inner.width = plan.width;
  inner.rows = {rows, plan.parts < rows ? plan.parts : 1};
  inner.k = k;
  inner.in = in;
  return inner;
}

template <class A>
LaunchConfig inner_config(const char* name, const FftConvCudaPlan& plan, int64_t groups, const Parts& rows,
                          void* stream) {
  const int64_t bytes = (int64_t{1} << (plan.inner + plan.width)) * static_cast<int64_t>(sizeof(Point<A>));
  return {name, dim3(unsigned_of(groups * plan.subtrees()), unsigned_of(rows.parts)), dim3(unsigned_of(plan.threads())),
          plan.backward ? 2 * bytes : bytes, stream};
}

// body(outer) for slices of channel groups, body(row, rows) for those of the batch.
template <class A, class Body>
void for_group_slices(const FftConvCudaPlan& plan, const A* table, void* stream, Body&& body) {
  for (int64_t group = 0; group < plan.groups; group += plan.slice_groups) {
    const int64_t left = plan.groups - group;
    body(Outer<A>{plan, table, stream, group, left < plan.slice_groups ? left : plan.slice_groups});
  }
}
template <class Body>
void for_row_slices(const FftConvCudaPlan& plan, int64_t B, Body&& body) {
  for (int64_t row = 0; row < B; row += plan.slice_rows) {
    body(row, B - row < plan.slice_rows ? B - row : plan.slice_rows);
  }
}

template <class T>
void forward_split(const FftConvForward& args, const FftConvCudaPlan& plan, void* stream) {
  using A = stat_t<T>;
  const Workspace<A> workspace(args.workspace, plan);
  fill_fft_table(workspace.table, plan.levels, stream);
  auto* const k = reinterpret_cast<Point<A>*>(workspace.rest);
  Point<A>* const x = k + plan.slice_groups * plan.group_points();
  for_group_slices<A>(plan, workspace.table, stream, [&](const Outer<A>& outer) {
    outer.split(kernel_steps_of(static_cast<const A*>(args.k), args.L, args.D), 0, 1, k);
    for_row_slices(plan, args.B, [&](int64_t row, int64_t rows) {
      outer.split(steps_of(static_cast<const T*>(args.x), args.L, args.D), row, rows, x);
      const InnerArgs<A> inner = inner_args<A>(plan, workspace.table, rows, k, x);
      launch(inner_config<A>("fft_conv_inner_forward", plan, outer.groups, inner.rows, stream),
             fft_conv_inner_forward_kernel<A>, inner);
      outer.join(steps_of(static_cast<T*>(args.y), args.L, args.D), row, rows, x);
    });
  });
}

template <class T>
void backward_split(const FftConvBackward& args, const FftConvCudaPlan& plan, void* stream) {
  using A = stat_t<T>;
  const Workspace<A> workspace(args.workspace, plan);
  fill_fft_table(workspace.table, plan.levels, stream);
  const int64_t array = plan.slice_groups * plan.group_points();
  auto* const k = reinterpret_cast<Point<A>*>(workspace.rest);
  Point<A>* const dk = k + array;
  Point<A>* const r = dk + array;
  Point<A>* const x = r + plan.slice_rows * array;
  for_group_slices<A>(plan, workspace.table, stream, [&](const Outer<A>& outer) {
    outer.split(kernel_steps_of(static_cast<const A*>(args.k), args.L, args.D), 0, 1, k);
    for_row_slices(plan, args.B, [&](int64_t row, int64_t rows) {
      outer.split(reversed(steps_of(static_cast<const T*>(args.dy), args.L, args.D)), row, rows, r);
      outer.split(steps_of(static_cast<const T*>(args.x), args.L, args.D), row, rows, x);
      InnerArgs<A> inner = inner_args<A>(plan, workspace.table, rows, k, r);
      inner.x = x;
      inner.dk = dk;
      inner.adds = row > 0;
      launch(inner_config<A>("fft_conv_inner_backward", plan, outer.groups, inner.rows, stream),
             fft_conv_inner_backward_kernel<A>, inner);
      outer.join(reversed(steps_of(static_cast<T*>(args.dx), args.L, args.D)), row, rows, r);
    });
    outer.join(reversed(kernel_steps_of(static_cast<A*>(args.dk), args.L, args.D)), 0, 1, dk);
  });
}

}  // namespace

void fft_conv_forward(const FftConvForward& args, void* stream) {
  if (args.B == 0 || args.L == 0 || args.D == 0) return;
  const FftConvCudaPlan plan = args.cuda_plan();
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    plan.is_split() ? forward_split<T>(args, plan, stream) : forward_whole<T>(args, plan, stream);
  });
}

void fft_conv_backward(const FftConvBackward& args, void* stream) {
  if (args.L == 0 || args.D == 0) return;
  const FftConvCudaPlan plan = args.cuda_plan();
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    plan.is_split() ? backward_split<T>(args, plan, stream) : backward_whole<T>(args, plan, stream);
  });
}

}  // namespace megalodon::cuda

#ifdef MEGALODON_SIMT
// For tests/test_fft_conv.py: reaches every plan at small sizes.
extern "C" __attribute__((visibility("default"))) void megalodon_simt_fft_conv_limits(int64_t block_points,
                                                                                      int64_t outer_levels,
                                                                                      int64_t slice_bytes) {
  megalodon::fft_conv_cuda_limits = {block_points, outer_levels, slice_bytes};
}
#endif

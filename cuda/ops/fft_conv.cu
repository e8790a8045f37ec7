// fft_conv on the GPU. Not yet run on a GPU.
//
// Computes  y_t = sum over s <= t of k_s x_(t-s) per channel, and its gradients, by a transform of H = 2^m >= L points
//           that does not wrap around (core/fft.cuh; ops/fft_conv.h).
// Layout    x, y, dy, dx [B, L, D] as they are; k, dk [D, L] stat; all compact. A group of C neighbouring channels lies
//           side by side at every step, in shared memory and in the workspace.
// Mapping   whole (H <= 8192, backward 4096; float64 2048): a block owns a group of channels and a part of the batch.
//           It transforms the group's kernels once and keeps their points in registers; row after row it reads x into
//           the root pass, passes through shared memory, multiplies at the leaves in registers on the way from the last
//           pass to the first of the inverse, and writes y out of the root's inverse. Backward x and the reversed dy
//           are two such arrays; the points of dk are summed up in registers, row by row.
//           split (longer): the first levels of the tree are passes of blocks that own a few neighbouring columns, from
//           x to the workspace; then a block per subtree does what it does for the whole, in place; then back. Channel
//           groups and rows are worked on in slices of 256 MiB.
// Traffic   whole: per element x and y once (backward x, dy, dx), in runs of C channels (C = 2 to 64: below 8 the
//           second-level cache moves whole sectors for parts of them), and 16 bytes of shared memory per point and pass
//           but the root's, 2 ceil(m / 3) passes (backward 3): shared memory and arithmetic are the limits expected.
//           Constants: 32 bytes per butterfly (float), 2 H numbers in all. split: besides, 32 bytes per point and row
//           for x forward and 48 backward, half of it for every kernel.
//           Workspace: 8 H bytes (float64: 16 H) of constants; whole backward, with several parts, parts D L sums;
//           split, at most 256 MiB, or two arrays of 8 H C bytes (backward four) if these are more.
// Numerics  constants made in double; arithmetic in stat. A transform spreads rounding over its row: y_t depends on
//           later x by rounding alone, at the scale of the row's largest values. dk is summed over the rows of a part
//           in order, then over parts in order: deterministic. Subnormal numbers are kept.
// Limits    a NaN or inf spreads over its row and channel, backwards in time too. Lengths just above a power of two
//           cost as much as the next one. D below C wastes threads. Any L whose arrays fit in memory.
#include "core/fft.cuh"
#include "core/reduce.cuh"
#include "ops/fft_conv.h"

namespace megalodon::cuda {
namespace {

constexpr int kOuterThreads = 256;

template <class A>
constexpr int kForwardEach = FftConvCudaPlan::butterflies(false, sizeof(A));
template <class A>
constexpr int kBackwardEach = FftConvCudaPlan::butterflies(true, sizeof(A));
template <class A>
constexpr int kForwardThreads = FftConvCudaPlan::most_threads(false, sizeof(A));
template <class A>
constexpr int kBackwardThreads = FftConvCudaPlan::most_threads(true, sizeof(A));
static_assert(kLeastFftLevels == FftConvCudaPlan::kLeastLevels);

// ---- where points come from and go to -------------------------------------------------------------------------------

// Real steps of channels; what does not exist is 0, and not written.
template <class T>
struct Steps {
  using A = stat_t<std::remove_const_t<T>>;
  T* first;                    // step 0 of channel 0 of row 0
  int64_t row, time, channel;  // distances
  int64_t L, D;

  // The steps t + m 2^log_distance, m = 0 .. 7. Registers are few: the address goes along.
  DEVICE void read(int64_t b, int64_t d, int64_t t, int log_distance, Point<A> (&v)[8]) const {
    const T* from = first + b * row + d * channel + t * time;
    const int64_t stride = time * (int64_t{1} << log_distance);
    const int last = last_of(d, t, log_distance);
    UNROLL
    for (int m = 0; m < 8; ++m) {
      v[m] = {m <= last ? widen(*from) : A(0), A(0)};
      from += stride;
    }
  }
  DEVICE void write(int64_t b, int64_t d, int64_t t, int log_distance, const Point<A> (&v)[8]) const {
    T* to = first + b * row + d * channel + t * time;
    const int64_t stride = time * (int64_t{1} << log_distance);
    const int last = last_of(d, t, log_distance);
    UNROLL
    for (int m = 0; m < 8; ++m) {
      if (m <= last) *to = narrow<T>(v[m].re);
      to += stride;
    }
  }
  // The last of them that exists, or less than 0.
  DEVICE int last_of(int64_t d, int64_t t, int log_distance) const {
    const int64_t last = d < D ? (L - 1 - t) >> log_distance : -1;
    return static_cast<int>(last < 7 ? last < 0 ? -1 : last : 7);
  }
};

template <class T>
Steps<T> steps_of(T* x, int64_t L, int64_t D) {  // of [B, L, D]
  return {x, L * D, D, 1, L, D};
}
template <class A>
Steps<A> kernel_steps_of(A* k, int64_t L, int64_t D) {  // of [D, L], or several of them
  return {k, D * L, 1, L, L, D};
}
template <class T>
Steps<T> reversed(const Steps<T>& steps) {
  return {steps.first + (steps.L - 1) * steps.time, steps.row, -steps.time, steps.channel, steps.L, steps.D};
}

template <class A, class Index>
DEVICE void read_points(const Point<A>* from, Index index, Index distance, Point<A> (&v)[8]) {
  UNROLL
  for (Index m = 0; m < 8; ++m) v[m] = from[index + m * distance];
}
template <class A, class Index>
DEVICE void write_points(Point<A>* to, Index index, Index distance, const Point<A> (&v)[8]) {
  UNROLL
  for (Index m = 0; m < 8; ++m) to[index + m * distance] = v[m];
}

// ---- a block's convolutions -----------------------------------------------------------------------------------------

// The transform of the kernel, times scale.
template <bool kReal, class A, int kEach, class Read>
DEVICE void transform_kernel(const BlockFft<A, kEach>& fft, A scale, Read&& read, Point<A> (&k)[kEach][8]) {
  fft.template split_root<kReal>(0, read);
  fft.split_middle();
  fft.for_leaves([&](int i, int, const auto& leaf) {
    leaf.get(fft.z, k[i]);
    split_node(k[i], leaf.w);
    UNROLL
    for (int m = 0; m < 8; ++m) k[i][m] = scale * k[i][m];
  });
  sync_block();  // all of it has been read
}

// read_kernel(index, v), read(b, index, v), write(b, index, v): as BlockFft's. kReal: what is read is.
template <bool kReal, class A, int kEach, class ReadKernel, class Read, class Write>
DEVICE void convolve(const BlockFft<A, kEach>& fft, const Parts& rows, int64_t part, A scale, ReadKernel&& read_kernel,
                     Read&& read, Write&& write) {
  Point<A> k[kEach][8];
  transform_kernel<kReal>(fft, scale, read_kernel, k);
  const int64_t end = rows.end(part);
  for (int64_t b = rows.begin(part); b < end; ++b) {
    fft.template split_root<kReal>(0, [&](int index, Point<A>(&v)[8]) { read(b, index, v); });
    fft.split_middle();
    fft.for_leaves([&](int i, int, const auto& leaf) {
      Point<A> v[8];
      leaf.get(fft.z, v);
      split_node(v, leaf.w);
      UNROLL
      for (int m = 0; m < 8; ++m) v[m] = v[m] * k[i][m];
      join_node(v, leaf.w);
      leaf.put(fft.z, v);
    });
    fft.join_middle();
    fft.join_root(0, [&](int index, const Point<A>(&v)[8]) { write(b, index, v); });
  }
}

// Array 0 holds r, the reversed dy, and what becomes of it; array 1 holds x.
template <bool kReal, class A, int kEach, class ReadKernel, class ReadR, class ReadX, class WriteX, class WriteKernel>
DEVICE void convolve_backward(const BlockFft<A, kEach>& fft, const Parts& rows, int64_t part, A scale,
                              ReadKernel&& read_kernel, ReadR&& read_r, ReadX&& read_x, WriteX&& write_dx,
                              WriteKernel&& write_dk) {
  Point<A> k[kEach][8], sum[kEach][8] = {};
  transform_kernel<kReal>(fft, scale, read_kernel, k);
  const int64_t end = rows.end(part);
  for (int64_t b = rows.begin(part); b < end; ++b) {
    fft.template split_root<kReal>(0, [&](int index, Point<A>(&v)[8]) { read_r(b, index, v); });
    fft.template split_root<kReal>(1, [&](int index, Point<A>(&v)[8]) { read_x(b, index, v); });
    fft.template split_middle<2>();
    fft.for_leaves([&](int i, int, const auto& leaf) {
      Point<A> v[8], x[8];
      leaf.get(fft.z + fft.points(), x);
      split_node(x, leaf.w);
      leaf.get(fft.z, v);
      split_node(v, leaf.w);
      UNROLL
      for (int m = 0; m < 8; ++m) {
        sum[i][m] = sum[i][m] + v[m] * x[m];
        v[m] = v[m] * k[i][m];
      }
      join_node(v, leaf.w);
      leaf.put(fft.z, v);
    });
    fft.join_middle();
    fft.join_root(0, [&](int index, const Point<A>(&v)[8]) { write_dx(b, index, v); });
  }
  sync_block();  // the last row has been read
  fft.for_leaves([&](int i, int, const auto& leaf) {
    UNROLL
    for (int m = 0; m < 8; ++m) sum[i][m] = scale * sum[i][m];
    join_node(sum[i], leaf.w);
    leaf.put(fft.z, sum[i]);
  });
  fft.join_middle();
  fft.join_root(0, write_dk);
}

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

// ---- split: the levels above the subtrees ---------------------------------------------------------------------------

// A pass of the nodes `depth` levels below the root, `pass` levels of the tree, for 2^columns columns of a node (a
// column: a channel at every so many steps).
template <class T>
struct OuterArgs {
  using A = stat_t<std::remove_const_t<T>>;
  const A* table;
  int levels, width;  // of the whole tree
  int depth, pass, columns;
  int64_t groups;        // of the slice
  int64_t row, channel;  // its first row and channel
  Steps<T> steps;        // at the root
  Point<A>* points;      // [rows, groups, H, C]
};

template <class T>
struct OuterBlock {
  using A = stat_t<std::remove_const_t<T>>;
  const OuterArgs<T>& args;
  int log_distance;  // between the steps of a column
  int64_t b, channel, node, column;
  Point<A>* first;  // of the node's points

  DEVICE explicit OuterBlock(const OuterArgs<T>& args) : args(args) {
    log_distance = args.levels - args.depth - args.pass;
    const int log_tiles = log_distance + args.width - args.columns;
    const int64_t block = blockIdx.x;
    const int64_t group = (block >> (log_tiles + args.depth)) % args.groups;
    b = (block >> (log_tiles + args.depth)) / args.groups;
    channel = args.channel + (group << args.width);
    node = (block >> log_tiles) & ((int64_t{1} << args.depth) - 1);
    column = (block & ((int64_t{1} << log_tiles) - 1)) << args.columns;
    const int64_t row_points = (b * args.groups + group) << args.levels;
    first = args.points + ((row_points + (node << (args.levels - args.depth))) << args.width);
  }
  DEVICE BlockFft<A, kForwardEach<A>> fft(Point<A>* z) const {
    return {z, args.table, (int64_t{1} << args.depth) + node, args.pass, args.columns};
  }
  // The column of a butterfly, and its point `step` of that column.
  DEVICE int64_t column_of(int index) const { return column + (index & ((1 << args.columns) - 1)); }
  DEVICE Point<A>* point(int index, int step) const {
    return first + ((static_cast<int64_t>(step) << (log_distance + args.width)) + column_of(index));
  }
  DEVICE int root_step(int index) const { return index >> args.columns; }
  DEVICE int leaf_step(int index) const { return 8 * root_step(index); }
  DEVICE int64_t root_distance() const { return int64_t{1} << (args.pass - 3 + log_distance + args.width); }
  DEVICE int64_t leaf_distance() const { return int64_t{1} << (log_distance + args.width); }
  // For Steps: of a butterfly of the root.
  DEVICE int64_t channel_of(int index) const { return channel + (column_of(index) & ((int64_t{1} << args.width) - 1)); }
  DEVICE int64_t time_of(int index) const {
    return (static_cast<int64_t>(root_step(index)) << log_distance) + (column_of(index) >> args.width);
  }
  DEVICE int log_time_distance() const { return args.pass - 3 + log_distance; }
};

// From the steps (at the root), or in place.
template <class T>
__global__ void __launch_bounds__(kOuterThreads, 2) fft_conv_outer_kernel(OuterArgs<const T> args) {
  using A = stat_t<T>;
  DYNAMIC_SHARED(Point<A>, z);
  const OuterBlock<const T> block(args);
  const auto fft = block.fft(z);
  if (args.depth == 0) {
    fft.template split_root<true>(0, [&](int i, Point<A>(&v)[8]) {
      args.steps.read(args.row + block.b, block.channel_of(i), block.time_of(i), block.log_time_distance(), v);
    });
  } else {
    fft.template split_root<false>(0, [&](int i, Point<A>(&v)[8]) {
      read_points<A>(block.point(i, block.root_step(i)), int64_t{0}, block.root_distance(), v);
    });
  }
  fft.split_middle();
  fft.for_leaves([&](int, int i, const auto& leaf) {
    Point<A> v[8];
    leaf.get(z, v);
    split_node(v, leaf.w);
    write_points(block.point(i, block.leaf_step(i)), int64_t{0}, block.leaf_distance(), v);
  });
}

template <class T>
__global__ void __launch_bounds__(kOuterThreads, 2) fft_conv_outer_inverse_kernel(OuterArgs<T> args) {
  using A = stat_t<T>;
  DYNAMIC_SHARED(Point<A>, z);
  const OuterBlock<T> block(args);
  const auto fft = block.fft(z);
  fft.for_leaves([&](int, int i, const auto& leaf) {
    Point<A> v[8];
    read_points<A>(block.point(i, block.leaf_step(i)), int64_t{0}, block.leaf_distance(), v);
    join_node(v, leaf.w);
    leaf.put(z, v);
  });
  fft.join_middle();
  fft.join_root(0, [&](int i, const Point<A>(&v)[8]) {
    if (args.depth == 0) {
      args.steps.write(args.row + block.b, block.channel_of(i), block.time_of(i), block.log_time_distance(), v);
    } else {
      write_points(block.point(i, block.root_step(i)), int64_t{0}, block.root_distance(), v);
    }
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

  int passes() const { return static_cast<int>(ceil_div(plan.levels - plan.inner, FftConvCudaPlan::kMostOuterLevels)); }
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

// The passes of fft_conv over the workspace, for transforms too long for shared memory: the levels of the tree above
// the subtrees that a block transforms as a whole.
#pragma once

#include "ops/fft_conv_block.cuh"

namespace megalodon::cuda {

constexpr int kOuterThreads = 256;

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

}  // namespace megalodon::cuda

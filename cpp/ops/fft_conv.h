// fft_conv: causal convolution of every channel with its own kernel, y_t = sum over s <= t of k_s x_(t-s).
//
// The gradients are convolutions too, in reversed time r_t = dy_(L-1-t):
//   dx_(L-1-t) = sum over s <= t of k_s r_(t-s),   dk_(L-1-t) = sum over the batch and s <= t of x_s r_(t-s).
#pragma once

#include "core/fft.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace megalodon {

// Where the GPU's plan changes. The tests in the executor, which cannot run shapes that large, set smaller numbers
// (megalodon_simt_fft_conv_limits in cuda/ops/fft_conv.cu); elsewhere they are constants.
struct FftConvCudaLimits {
  int64_t block_points = int64_t{1} << 15;  // of a block's transform: at least 1024; no more than there are registers
  int64_t outer_levels = 11;                // of a pass above the subtrees, however many these are
  int64_t slice_bytes = int64_t{1} << 28;   // of the workspace, if one group and row fit
};
#ifdef MEGALODON_SIMT
inline FftConvCudaLimits fft_conv_cuda_limits;
#else
constexpr FftConvCudaLimits fft_conv_cuda_limits;
#endif

// How the GPU cuts the work, by shape alone. H = 2^levels >= L points. A group of 2^width channels is transformed by a
// block in shared memory if at least two channels fit there ("whole"); else the first levels of the tree are passes
// over the workspace and a block transforms a subtree of 2^inner points ("split"). Nothing here is measured yet.
struct FftConvCudaPlan {
  // Butterflies of 8 points that a thread has of each array, in registers along with what is kept of the kernel and of
  // dk: as many as 128 registers hold.
  static constexpr int butterflies(bool backward, int64_t stat) {
    return static_cast<int>(16 / stat) / (backward ? 2 : 1);
  }
  static constexpr int most_threads(bool, int64_t stat) { return stat == 8 ? 256 : 512; }
  static int64_t most_points(bool backward, int64_t stat) {
    const int64_t fit = 8 * butterflies(backward, stat) * most_threads(backward, stat);
    return fit < fft_conv_cuda_limits.block_points ? fit : fft_conv_cuda_limits.block_points;
  }
  static constexpr int64_t block_points(int64_t stat) { return (int64_t{1} << 15) / stat; }  // 64 KiB
  static constexpr int kLeastLevels = 4;  // of a block's tree, and of a pass above the subtrees
  static_assert(FftConvCudaLimits{}.outer_levels + 1 >= 2 * kLeastLevels);
  static constexpr int64_t kMostWidth = 6, kSplitWidth = 3;
  static constexpr int64_t kLeastSubtree = 1024;  // points
  static constexpr int64_t kProcessors = 132, kThreadsEach = 1024;

  bool backward;
  int64_t stat;  // bytes of a number
  int levels, width, inner;
  int64_t groups;
  int64_t parts;                     // of the batch (split: of a slice), worked on side by side
  int64_t slice_groups, slice_rows;  // split: worked on at a time

  static FftConvCudaPlan of(bool backward, DType stat_type, int64_t B, int64_t L, int64_t D) {
    FftConvCudaPlan p{};
    p.backward = backward;
    p.stat = size_of(stat_type);
    p.levels = kLeastLevels;
    while (p.points() < L) ++p.levels;
    const int64_t H = p.points(), target = block_points(p.stat), most = most_points(backward, p.stat);
    if (2 * H > most) {
      p.split(B, D);
      return p;
    }
    p.inner = p.levels;
    const int64_t least = 32 * 8 * butterflies(backward, p.stat);  // a warp's points
    const auto may_grow = [&] {
      const int64_t next = H << (p.width + 1);
      return int64_t{1} << p.width < D && (next <= target ? p.width < kMostWidth : next <= most && p.width < 3);
    };
    while (H << p.width < least || may_grow()) ++p.width;
    p.groups = ceil_div(D, int64_t{1} << p.width);
    p.parts = Parts::of(B, 1, p.wanted(p.groups)).parts;
    return p;
  }
  int64_t points() const { return int64_t{1} << levels; }
  bool is_split() const { return inner < levels; }
  int64_t threads() const { return (int64_t{1} << (inner + width)) / 8 / butterflies(backward, stat); }
  int64_t group_points() const { return int64_t{1} << (levels + width); }
  int64_t group_bytes() const { return group_points() * 2 * stat; }
  int64_t subtrees() const { return int64_t{1} << (levels - inner); }  // of a group

  // Arrays of a slice: the kernels, backward also the sums for dk, per group; x, backward also dy, per group and row.
  int64_t fixed_arrays() const { return backward ? 2 : 1; }
  int64_t row_arrays() const { return backward ? 2 : 1; }
  int64_t slice_bytes() const {
    return is_split() ? slice_groups * (fixed_arrays() + row_arrays() * slice_rows) * group_bytes() : 0;
  }
  int64_t table_bytes() const { return 2 * points() * stat; }
  // The parts' sums for dk where there are several, whole.
  int64_t partial_bytes(int64_t L, int64_t D) const {
    return backward && !is_split() && parts > 1 ? parts * D * L * stat : 0;
  }
  static constexpr int64_t kAlignment = 16;
  int64_t workspace_bytes(int64_t L, int64_t D) const {
    return kAlignment + table_bytes() + slice_bytes() + partial_bytes(L, D);
  }

 private:
  // Parts that fill the GPU with this many blocks each.
  int64_t wanted(int64_t blocks) const {
    const int64_t parts = ceil_div(kProcessors * kThreadsEach / threads(), blocks < 1 ? 1 : blocks);
    return parts < 1 ? 1 : parts;
  }
  void split(int64_t B, int64_t D) {
    while (width < kSplitWidth && int64_t{1} << width < D) ++width;
    while (width > 0 && group_bytes() > fft_conv_cuda_limits.slice_bytes) --width;
    while (group_points() >> kLeastLevels < kLeastSubtree) ++width;
    inner = levels - kLeastLevels;
    const int64_t most =
        most_points(backward, stat) < block_points(stat) ? most_points(backward, stat) : block_points(stat);
    while (int64_t{1} << (inner + width) > most) --inner;
    groups = ceil_div(D, int64_t{1} << width);
    const auto fit = [](int64_t many, int64_t most) { return many < 1 || most < 1 ? 1 : many < most ? many : most; };
    const int64_t arrays = fft_conv_cuda_limits.slice_bytes / group_bytes();
    slice_groups = fit(arrays / (fixed_arrays() + row_arrays() * fit(B, 8)), groups);
    slice_rows = fit((arrays / slice_groups - fixed_arrays()) / row_arrays(), B);
    parts = backward ? 1 : Parts::of(slice_rows, 1, wanted(slice_groups * subtrees())).parts;
  }
};

struct FftConvForward {
  DType dtype;      // of x and y
  const void* x;    // [B, L, D]
  const void* k;    // [D, L] stat
  void* y;          // [B, L, D]
  void* workspace;  // the constants, then a slot per task
  int64_t B, L, D;

  static constexpr int64_t kArrays = 2;
  int64_t points() const { return fft_points(B * D == 0 ? 0 : L); }
  ChannelTasks tasks() const { return ChannelTasks::of(D, stat_dtype(dtype), kArrays * fft_array_bytes(points())); }
  int64_t table_bytes() const { return fft_table_bytes(points(), stat_dtype(dtype)); }
  int64_t workspace_bytes() const { return kMaxVectorBytes + table_bytes() + tasks().bytes(); }
  FftConvCudaPlan cuda_plan() const { return FftConvCudaPlan::of(false, stat_dtype(dtype), B, B * D == 0 ? 0 : L, D); }
};

struct FftConvBackward {
  DType dtype;      // of dy, x and dx
  const void* dy;   // [B, L, D]
  const void* x;    // [B, L, D]
  const void* k;    // [D, L] stat
  void* dx;         // [B, L, D]
  void* dk;         // [D, L] stat
  void* workspace;  // as in FftConvForward
  int64_t B, L, D;

  static constexpr int64_t kArrays = 4;
  int64_t points() const { return fft_points(D == 0 ? 0 : L); }
  ChannelTasks tasks() const { return ChannelTasks::of(D, stat_dtype(dtype), kArrays * fft_array_bytes(points())); }
  int64_t table_bytes() const { return fft_table_bytes(points(), stat_dtype(dtype)); }
  int64_t workspace_bytes() const { return kMaxVectorBytes + table_bytes() + tasks().bytes(); }
  FftConvCudaPlan cuda_plan() const { return FftConvCudaPlan::of(true, stat_dtype(dtype), B, D == 0 ? 0 : L, D); }
};

static inline FftConvForward check_fft_conv(Checker& c, const DLTensor* x_in, const DLTensor* k_in, Outputs&& out) {
  const Tensor x = c.activation("x", x_in, {any("B"), any("L"), any("D")});
  const Tensor k = c.tensor("k", k_in, stat_dtype(x.dtype), {x.dim(2, "D"), x.dim(1, "L")});
  FftConvForward args{};
  args.dtype = x.dtype;
  args.x = x.data;
  args.k = k.data;
  args.B = x.shape[0];
  args.L = x.shape[1];
  args.D = x.shape[2];
  args.y = out.like(c, "y", x);
  args.workspace =
      out.workspace(c, c.on_cuda() ? args.cuda_plan().workspace_bytes(args.L, args.D) : args.workspace_bytes());
  return args;
}

static inline FftConvBackward check_fft_conv_backward(Checker& c, const DLTensor* dy_in, const DLTensor* x_in,
                                                      const DLTensor* k_in, Outputs&& out) {
  const Tensor x = c.activation("x", x_in, {any("B"), any("L"), any("D")});
  const Tensor dy = c.like("dy", dy_in, x);
  const Tensor k = c.tensor("k", k_in, stat_dtype(x.dtype), {x.dim(2, "D"), x.dim(1, "L")});
  FftConvBackward args{};
  args.dtype = x.dtype;
  args.dy = dy.data;
  args.x = x.data;
  args.k = k.data;
  args.B = x.shape[0];
  args.L = x.shape[1];
  args.D = x.shape[2];
  args.dx = out.like(c, "dx", x);
  args.dk = out.like(c, "dk", k);
  args.workspace =
      out.workspace(c, c.on_cuda() ? args.cuda_plan().workspace_bytes(args.L, args.D) : args.workspace_bytes());
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL(fft_conv_forward, FftConvForward)
MEGALODON_KERNEL(fft_conv_backward, FftConvBackward)

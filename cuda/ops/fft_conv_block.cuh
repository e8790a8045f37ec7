// What the kernels of fft_conv have in common: steps of tensors as points of a transform, and the convolutions of a
// block, forward and backward, from wherever its points come.
#pragma once

#include "core/fft.cuh"
#include "ops/fft_conv.h"

namespace megalodon::cuda {

// Butterflies of a thread.
template <class A>
constexpr int kForwardEach = FftConvCudaPlan::butterflies(false, sizeof(A));
template <class A>
constexpr int kBackwardEach = FftConvCudaPlan::butterflies(true, sizeof(A));
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

}  // namespace megalodon::cuda

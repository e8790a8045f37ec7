// A Fourier transform over time of several channels at once, by a block of threads in shared memory.
//
// The mathematics is that of the CPU (cpp/core/fft.h): arithmetic in C[t] / (t^H - i), where the real part of a product
// of two real signals of at most H steps is their causal convolution; splitting t^2h - c^2 = (t^h - c)(t^h + c); one
// constant c per node of this tree; nothing is ever reordered. Nodes are numbered like a heap: the root is 1, the
// children of q are 2q and 2q + 1, so that node q of depth l has the modulus t^(H / 2^l) - e^(2 pi i turns), turns =
// (the bits of q reversed, behind the binary point) - 2^-(l+2), and a block may work on any subtree.
//
// Channels (or columns of a larger transform) lie side by side at every step, which to the tree is the same as steps
// that are further apart: a node of h points of C channels is one of h C points. Only who reads and writes steps has to
// know C. Three levels at a time in registers, 8 points per butterfly; where the number of levels is not a multiple of
// three, the butterflies of the root leave out the rest of theirs. Every thread has kEach butterflies of a pass.
//
// In shared memory bits 4 to 6 of a point's index are mixed into bits 0 to 3, so that the half warp which is served at
// once meets 16 different pairs of banks in passes of every distance.
#pragma once

#include "core/pack.cuh"
#include "core/portable.cuh"
#include "core/turns.cuh"

namespace megalodon::cuda {

template <class A>
struct alignas(2 * sizeof(A)) Point {
  A re, im;
};
template <class A>
DEVICE Point<A> operator+(const Point<A>& u, const Point<A>& v) {
  return {u.re + v.re, u.im + v.im};
}
template <class A>
DEVICE Point<A> operator*(const Point<A>& u, const Point<A>& v) {
  return {u.re * v.re - u.im * v.im, u.re * v.im + u.im * v.re};
}
template <class A>
DEVICE Point<A> operator*(A a, const Point<A>& u) {
  return {a * u.re, a * u.im};
}

// ---- constants ------------------------------------------------------------------------------------------------------

// The square roots c1, c2 = sqrt(c1), c3 = sqrt(c2) of a node's three levels and c3 e^(i pi/4) for the right half of
// the third, as re, im pairs.
constexpr int kNodeConstants = 8;

DEVICE uint64_t reversed_bits(uint64_t v) {
  v = (v >> 1 & 0x5555555555555555u) | (v & 0x5555555555555555u) << 1;
  v = (v >> 2 & 0x3333333333333333u) | (v & 0x3333333333333333u) << 2;
  v = (v >> 4 & 0x0f0f0f0f0f0f0f0fu) | (v & 0x0f0f0f0f0f0f0f0fu) << 4;
  v = (v >> 8 & 0x00ff00ff00ff00ffu) | (v & 0x00ff00ff00ff00ffu) << 8;
  v = (v >> 16 & 0x0000ffff0000ffffu) | (v & 0x0000ffff0000ffffu) << 16;
  return v >> 32 | v << 32;
}

constexpr int kFftTableThreads = 128;

// table[node] for nodes 1 .. nodes - 1, computed in double from exact angles. 0 is unused.
template <class A>
__global__ void __launch_bounds__(kFftTableThreads) fft_table_kernel(A* table, int64_t nodes) {
  const int64_t node = static_cast<int64_t>(blockIdx.x) * kFftTableThreads + threadIdx.x;
  if (node == 0 || node >= nodes) return;
  const uint64_t reversed = reversed_bits(static_cast<uint64_t>(node));
  const uint64_t depth = reversed & (0 - reversed);  // 2^-(l+1) turns
  const uint64_t turns = reversed - depth / 2;
  const uint64_t roots[kNodeConstants / 2] = {turns >> 1, turns >> 2, turns >> 3, (turns >> 3) + (uint64_t{1} << 61)};
  Pack<A, kNodeConstants> constants;
  UNROLL
  for (int i = 0; i < kNodeConstants / 2; ++i) {
    double sine, cosine;
    sin_cos_turns(roots[i], sine, cosine);
    constants.v[2 * i] = static_cast<A>(cosine);
    constants.v[2 * i + 1] = static_cast<A>(sine);
  }
  store(table + node * kNodeConstants, constants);
}

// The table of a tree with 2^levels leaves. `table` has room for 2^(levels+1) numbers and is aligned to 16 bytes.
template <class A>
void fill_fft_table(A* table, int levels, void* stream) {
  const int64_t nodes = (int64_t{1} << levels) / 4;
  launch({"fft_table", dim3(static_cast<unsigned>((nodes + kFftTableThreads - 1) / kFftTableThreads)),
          dim3(kFftTableThreads), 0, stream},
         fft_table_kernel<A>, table, nodes);
}

// ---- butterflies ----------------------------------------------------------------------------------------------------

// (a, b) -> (a + c b, a - c b), or with i c for c; kReal: b is real.
template <bool kTimesI, bool kReal = false, class A>
DEVICE void split(Point<A>& a, Point<A>& b, A c_re, A c_im) {
  A re = b.re * c_re, im = b.re * c_im;
  if constexpr (!kReal) {
    re -= b.im * c_im;
    im += b.im * c_re;
  }
  if constexpr (kTimesI) {
    b = {a.re + im, a.im - re};
    a = {a.re - im, a.im + re};
  } else {
    b = {a.re - re, a.im - im};
    a = {a.re + re, a.im + im};
  }
}

// Twice the inverse of split.
template <bool kTimesI, class A>
DEVICE void join(Point<A>& a, Point<A>& b, A c_re, A c_im) {
  const A re = a.re - b.re, im = a.im - b.im;
  a = {a.re + b.re, a.im + b.im};
  if constexpr (kTimesI) {
    b = {im * c_re - re * c_im, -(re * c_re + im * c_im)};
  } else {
    b = {re * c_re + im * c_im, im * c_re - re * c_im};
  }
}

// The first `levels` of three levels below a node; kReal: of real points.
template <bool kReal = false, class A>
DEVICE void split_node(Point<A> (&z)[8], const Pack<A, kNodeConstants>& w, int levels = 3) {
  UNROLL
  for (int i = 0; i < 4; ++i) split<false, kReal>(z[i], z[4 + i], w.v[0], w.v[1]);
  if (levels == 1) return;
  UNROLL
  for (int i = 0; i < 2; ++i) {
    split<false>(z[i], z[2 + i], w.v[2], w.v[3]);
    split<true>(z[4 + i], z[6 + i], w.v[2], w.v[3]);
  }
  if (levels == 2) return;
  split<false>(z[0], z[1], w.v[4], w.v[5]);
  split<true>(z[2], z[3], w.v[4], w.v[5]);
  split<false>(z[4], z[5], w.v[6], w.v[7]);
  split<true>(z[6], z[7], w.v[6], w.v[7]);
}

template <class A>
DEVICE void join_node(Point<A> (&z)[8], const Pack<A, kNodeConstants>& w, int levels = 3) {
  if (levels == 3) {
    join<false>(z[0], z[1], w.v[4], w.v[5]);
    join<true>(z[2], z[3], w.v[4], w.v[5]);
    join<false>(z[4], z[5], w.v[6], w.v[7]);
    join<true>(z[6], z[7], w.v[6], w.v[7]);
  }
  if (levels >= 2) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      join<false>(z[i], z[2 + i], w.v[2], w.v[3]);
      join<true>(z[4 + i], z[6 + i], w.v[2], w.v[3]);
    }
  }
  UNROLL
  for (int i = 0; i < 4; ++i) join<false>(z[i], z[4 + i], w.v[0], w.v[1]);
}

// ---- the tree in shared memory --------------------------------------------------------------------------------------

constexpr int kLeastFftLevels = 4;  // of a block: its root and its leaves are different passes

// The subtree below node `root`: 2^levels steps of 2^width channels, 8 kEach points for each of the block's threads.
// All threads call its functions. Between a thread's root_inverse and its next root no barrier is needed: it overwrites
// what it has read itself.
template <class A, int kEach>
struct BlockFft {
  Point<A>* z;     // in shared memory; a second array follows the first
  const A* table;  // of the whole tree
  int64_t root;
  int levels, width;

  DEVICE int points() const { return 1 << (levels + width); }
  DEVICE int root_levels() const { return (levels - 1) % 3 + 1; }

  // Where a point lies: linear over the bits, so that sums without carry become exclusive ors.
  static DEVICE int place(int i) { return i ^ (i >> 3 & 6) ^ (i >> 6 & 1) * 9; }

  struct Butterfly {
    Pack<A, kNodeConstants> w;
    int first, one, two, four;  // places of its first point, and of the distances from point to point

    DEVICE int place_of(int m) const {
      return first ^ ((m & 1) != 0 ? one : 0) ^ ((m & 2) != 0 ? two : 0) ^ ((m & 4) != 0 ? four : 0);
    }
    DEVICE void get(const Point<A>* from, Point<A> (&v)[8]) const {
      UNROLL
      for (int m = 0; m < 8; ++m) v[m] = from[place_of(m)];
    }
    DEVICE void put(Point<A>* to, const Point<A> (&v)[8]) const {
      UNROLL
      for (int m = 0; m < 8; ++m) to[place_of(m)] = v[m];
    }
  };

  // A butterfly whose nodes are `depth` levels below the root.
  DEVICE Butterfly butterfly(int index, int depth) const {
    const int log_distance = levels + width - depth - 3;
    const int node = index >> log_distance, first = index & ((1 << log_distance) - 1);
    return {load<kNodeConstants>(table + ((root << depth) + node) * kNodeConstants),
            place(node << (log_distance + 3) | first), place(1 << log_distance), place(2 << log_distance),
            place(4 << log_distance)};
  }
  // body(index) for the thread's butterflies, one after the other: what a caller keeps leaves registers for one.
  template <class Body>
  static DEVICE void for_mine(Body&& body) {
    ROLL for (int k = 0; k < kEach; ++k) body(anew(static_cast<int>(threadIdx.x + k * blockDim.x)));
  }

  // read(index, v) gives the points index + m points() / 8, m = 0 .. 7, of the array; write takes them.
  template <bool kReal, class Read>
  DEVICE void split_root(int array, Read&& read) const {
    for_mine([&](int index) {
      Point<A> v[8];
      read(index, v);
      const Butterfly at = butterfly(index, 0);
      split_node<kReal>(v, at.w, root_levels());
      at.put(z + array * points(), v);
    });
  }
  template <class Write>
  DEVICE void join_root(int array, Write&& write) const {
    for_mine([&](int index) {
      Point<A> v[8];
      const Butterfly at = butterfly(index, 0);
      at.get(z + array * points(), v);
      join_node(v, at.w, root_levels());
      write(index, v);
    });
  }

  // The passes between the root's and the leaves', of the first kArrays arrays.
  template <int kArrays = 1>
  DEVICE void split_middle() const {
    for (int depth = root_levels(); depth < levels - 3; depth += 3) {
      sync_block();  // the points of the pass before are there
      for_mine([&](int index) {
        const Butterfly at = butterfly(index, depth);
        ROLL for (int array = 0; array < kArrays; ++array) {
          Point<A> v[8];
          at.get(z + array * points(), v);
          split_node(v, at.w);
          at.put(z + array * points(), v);
        }
      });
    }
    sync_block();  // the points of the last of them are there
  }
  DEVICE void join_middle() const {
    for (int depth = levels - 6; depth >= root_levels(); depth -= 3) {
      sync_block();  // the points of the pass before are there
      for_mine([&](int index) {
        const Butterfly at = butterfly(index, depth);
        Point<A> v[8];
        at.get(z, v);
        join_node(v, at.w);
        at.put(z, v);
      });
    }
    sync_block();  // the points of the last of them are there
  }

  // body(k, index, butterfly) for the leaves' nodes; k is known at compile time once unrolled. A thread has a butterfly
  // for itself, so that no barrier is needed between get and put.
  template <class Body>
  DEVICE void for_leaves(Body&& body) const {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      const int index = anew(static_cast<int>(threadIdx.x + k * blockDim.x));
      body(k, index, butterfly(index, levels - 3));
    }
  }
};

}  // namespace megalodon::cuda

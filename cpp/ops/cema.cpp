// cema on the CPU, by the recurrence ("scan").
//
// Computes  h_t = a x_t + q h_(t-1), y_t = Re sum_n g_n h_(t,n) + omega x_t and its gradients (ops/cema.h); equation
//           (2) of arXiv 2404.08801 as the released code has it.
// Layout    x, y, dy, dx [B, L, D]; parameters [D, N], [D], [D, N, 2]; states [B, D, N, 2]; all compact.
// Mapping   a task is a part of the batch and a range of columns (16 channels, one or more vectors). It walks time in
//           blocks, and in each block all its columns, so that memory is read in order: some columns at a time are
//           packed, groups of wavelets, whole in registers, run over each vector, and the result is unpacked. The
//           backward pass keeps the state at every block's start, then goes through the blocks from the last,
//           recomputing a group's states into L1.
// Traffic   forward 2 elements moved and 6 N FMA per element; backward 5 elements and 22 N FMA: compute-bound.
// Numerics  coefficients from the raw parameters in float64. Inside a block the scan's type (float32, or float64 for
//           float64 x); between blocks the state is float64 and what was carried in is advanced by q^T in float64, so
//           that the rounding of q does not add up over L. Gradients of parameters: float32 sums over a block, float64
//           over blocks and rows, in a fixed order. Subnormal numbers count as zeros (core/subnormals.h).
//           A forward pass of a few steps, as in decoding, runs over the wavelets of a channel instead (cema_short.h).
// Limits    none on B, L, D; N >= 1. sigmoid(alpha) below 1e-20 counts as 1e-20 in the scan.
#include "ops/cema.h"

#include "core/rows.h"
#include "core/subnormals.h"
#include "ops/cema_scan.h"
#include "ops/cema_short.h"
#include "ops/cema_tiles.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

// Calls body(part, first, last) for the tasks [begin, end): the columns [first, last) of one part of the batch.
template <class Body>
void for_columns(const CemaShape& shape, int64_t begin, int64_t end, Body&& body) {
  const int64_t columns = shape.columns();
  while (begin < end) {
    const int64_t part = begin / columns;
    const int64_t first = begin - part * columns;
    const int64_t last = first + (end - begin) < columns ? first + (end - begin) : columns;
    body(part, first, last);
    begin += last - first;
  }
}

// Calls body(d) for the first channel of every vector of channels of the columns [first, last).
template <class A, class Body>
void for_vectors(const CemaShape& shape, int64_t first, int64_t last, Body&& body) {
  const int64_t end = last * kColumn < shape.D ? last * kColumn : shape.D;
  for (int64_t d = first * kColumn; d < end; d += kLanes<A>) body(d);
}

// Calls body(constant G, n) for the wavelets in groups of at most kMost.
template <int kMost, class Body>
void for_wavelets(int64_t N, Body&& body) {
  int64_t n = 0;
  for (; n + kMost <= N; n += kMost) body(std::integral_constant<int, kMost>{}, n);
  if constexpr (kMost > 3) {
    if (N - n == 3) return body(std::integral_constant<int, 3>{}, n);
  }
  if constexpr (kMost > 2) {
    if (N - n == 2) return body(std::integral_constant<int, 2>{}, n);
  }
  if (N - n == 1) body(std::integral_constant<int, 1>{}, n);
}

// The tables of all channels, in the workspace.
template <class A>
struct Tables {
  A* narrow;
  double* wide;
  int64_t N;

  // Takes its room from the workspace and gives what follows.
  double* place(void* workspace, const CemaShape& shape) {
    N = shape.N;
    wide = static_cast<double*>(workspace);
    narrow = reinterpret_cast<A*>(wide + shape.wavelets() * kWide<A>);
    return reinterpret_cast<double*>(narrow + shape.wavelets() * kNarrow);
  }
  // Of the vector of channels from d on, wavelet n.
  A* narrow_of(int64_t d, int64_t n) const { return narrow + (d * N + n * kLanes<A>)*kNarrow; }
  double* wide_of(int64_t d, int64_t n) const { return wide + (d * N + n * kLanes<A>)*kWide<A>; }

  template <class Args>
  void make(const Args& args, bool unscaled, int64_t steps) const {
    const Parameters<A> parameters = Parameters<A>::of(args);
    parallel_for(args.columns(), 1 + 256 / (kColumn * N), [&](int64_t begin, int64_t end) {
      for_vectors<A>(args, begin, end,
                     [&](int64_t d) { make_tables(parameters, d, unscaled, steps, narrow_of(d, 0), wide_of(d, 0)); });
    });
  }
};

// The running state of a vector of channels from or to a tensor [D, N, 2] (of one row of the batch), times or divided
// by a. nullptr reads as zeros.
template <class A>
void read_state(const A* tensor, const Tables<A>& tables, const CemaShape& shape, int64_t d, bool divide, double* H) {
  constexpr int64_t W = kLanes<A>;
  const int64_t lanes = shape.D - d < W ? shape.D - d : W;
  std::memset(H, 0, shape.N * 2 * W * sizeof(double));
  if (tensor == nullptr) return;
  for (int64_t l = 0; l < lanes; ++l) {
    const A* from = tensor + (d + l) * shape.N * 2;
    for (int64_t n = 0; n < shape.N; ++n) {
      const double a = divide ? tables.wide_of(d, n)[kA * W + l] : 1.0;
      H[2 * n * W + l] = static_cast<double>(from[2 * n]) / a;
      H[(2 * n + 1) * W + l] = static_cast<double>(from[2 * n + 1]) / a;
    }
  }
}

template <class A>
void write_state(A* tensor, const Tables<A>& tables, const CemaShape& shape, int64_t d, bool multiply,
                 const double* H) {
  constexpr int64_t W = kLanes<A>;
  const int64_t lanes = shape.D - d < W ? shape.D - d : W;
  for (int64_t l = 0; l < lanes; ++l) {
    A* to = tensor + (d + l) * shape.N * 2;
    for (int64_t n = 0; n < shape.N; ++n) {
      const double a = multiply ? tables.wide_of(d, n)[kA * W + l] : 1.0;
      to[2 * n] = static_cast<A>(H[2 * n * W + l] * a);
      to[2 * n + 1] = static_cast<A>(H[(2 * n + 1) * W + l] * a);
    }
  }
}

// Time blocks of up to kStaged columns go from and to rows in memory order, by way of packed copies: step t of vector v
// at packed + v * room + t * W. A vector of channels read alone would be a line per row, which the hardware does not
// foresee, at a stride that caches take badly (D a power of two). The room is one step more, for that same reason.
template <class A>
constexpr int64_t room_of(int64_t steps) {
  return (steps + 1) * kLanes<A>;
}
template <class T>
void pack(const T* rows, int64_t D, int64_t channels, int64_t steps, int64_t room, stat_t<T>* packed) {
  constexpr int64_t W = kLanes<stat_t<T>>;
  for (int64_t t = 0; t < steps; ++t) {
    stat_t<T>* out = packed + t * W;
    for (int64_t d = 0; d < channels; d += W, out += room) store(out, load(rows + t * D + d, channels - d));
  }
}
template <class T>
void unpack(const stat_t<T>* packed, int64_t D, int64_t channels, int64_t steps, int64_t room, T* rows) {
  constexpr int64_t W = kLanes<stat_t<T>>;
  for (int64_t t = 0; t < steps; ++t) {
    const stat_t<T>* in = packed + t * W;
    for (int64_t d = 0; d < channels; d += W, in += room) store(rows + t * D + d, load(in), channels - d);
  }
}

// Calls body(d, end) for the channels [d, end) of every kStaged columns of [first, last).
template <class Body>
void for_stages(const CemaShape& shape, int64_t first, int64_t last, Body&& body) {
  constexpr int64_t kChannels = CemaShape::kStaged * kColumn;
  const int64_t end = last * kColumn < shape.D ? last * kColumn : shape.D;
  for (int64_t d = first * kColumn; d < end; d += kChannels) body(d, d + kChannels < end ? d + kChannels : end);
}

// ---- forward ----

// Where the next block's x and y lie, fetched while this one is worked on: rows are D elements apart, which the
// hardware does not foresee.
template <class T>
struct Ahead {
  const T* x;
  T* y;
  int64_t D, rows, each;

  void fetch() {
    for (int64_t i = 0; i < each && rows > 0; ++i, --rows, x += D, y += D) {
      __builtin_prefetch(x, 0, 2);
      __builtin_prefetch(y, 1);
    }
  }
};

// One block of one vector of channels. x, y: its first row. hi, lo: the state, [N, 2, W] each.
template <class T>
void forward_block(const CemaForward& args, const TileTables<stat_t<T>>& tables, int64_t steps, int64_t d, const T* x,
                   T* y, stat_t<T>* hi, stat_t<T>* lo, Ahead<T> ahead) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>, K = CemaShape::kForward;
  alignas(64) A packed[K * W], sums[K * W], states[K / kTile * kKept * 2 * W];
  const int64_t lanes = args.D - d < W ? args.D - d : W, N = args.N, rest = steps % kTile;
  const int64_t tiles = ceil_div(steps, kTile);
  for (int64_t t = 0; t < steps; ++t) store(packed + t * W, load(x + t * args.D, lanes));
  if (rest != 0) std::memset(packed + steps * W, 0, (kTile - rest) * W * sizeof(A));
  ahead.each = ceil_div(ahead.rows, ceil_div(N, kKept) * ceil_div(tiles, kTogether));
  const bool direct = lanes == W && rest == 0;
  for (int64_t n = 0; n < N; n += kKept) {
    const TileStates of{tiles, N - n < kKept ? N - n : kKept};
    for_wavelets<kPaired>(of.group, [&](auto paired, int64_t i) {
      constexpr int G = paired.value;
      alignas(64) A end[2 * G * W];
      const A* table = tables.row(d, n + i);
      A *high = hi + 2 * (n + i) * W, *low = lo + 2 * (n + i) * W;
      std::memcpy(end, high, sizeof end);
      advance_block<A, G>(table, packed, of, i, end, states);
      for (int g = 0; g < G; ++g) {
        if (rest != 0) {
          finish_tile(table + g * kRow * W, tables.exact_q(d, n + i + g), packed + (steps - rest) * W, rest,
                      states + (of.at(tiles - 1) + (i + g) * of.stride(tiles - 1)) * W, high + 2 * g * W);
        } else if (steps == K) {
          carry(table + g * kRow * W, end + 2 * g * W, high + 2 * g * W, low + 2 * g * W);
        } else {
          std::memcpy(high + 2 * g * W, end + 2 * g * W, 2 * W * sizeof(A));
        }
      }
    });
    const auto outputs = [&](auto together, int64_t m) {
      constexpr int M = together.value;
      const int64_t t = m * kTile;
      const auto half = [&](auto first) {
        const auto put = [&](auto* out, int64_t step) {
          output_tiles<A, M, first.value>(tables.response(d), tables.row(d, n), packed + t * W, states + of.at(m) * W,
                                          of.group, n == 0 ? nullptr : sums + t * W, out, step);
        };
        if (direct && n + of.group == N) {
          put(y + t * args.D, args.D);
        } else {
          put(sums + t * W, W);
        }
      };
      half(std::integral_constant<int, 0>{});
      half(std::integral_constant<int, kOutputs>{});
      ahead.fetch();
    };
    int64_t m = 0;
    for (; m + kTogether <= tiles; m += kTogether) outputs(std::integral_constant<int, kTogether>{}, m);
    for (; m < tiles; ++m) outputs(std::integral_constant<int, 1>{}, m);
  }
  if (direct) return;
  for (int64_t t = 0; t < steps; ++t) store(y + t * args.D, load(sums + t * W), lanes);
}

// One row of the batch, the channels [d0, d1).
template <class T>
void forward_row(const CemaForward& args, const TileTables<stat_t<T>>& tables, int64_t b, int64_t d0, int64_t d1,
                 stat_t<T>* states) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>, K = CemaShape::kForward;
  const int64_t N = args.N, at = b * args.D * N * 2;
  const auto hi = [&](int64_t d) { return states + d * N * 4; };
  const auto lo = [&](int64_t d) { return states + d * N * 4 + 2 * N * W; };
  const auto unpacked = [&](int64_t d, auto&& body) {
    for (int64_t l = 0; l < W && d + l < args.D; ++l) {
      for (int64_t i = 0; i < 2 * N; ++i) body(at + (d + l) * 2 * N + i, hi(d) + i * W + l);
    }
  };
  for (int64_t d = d0; d < d1; d += W) {
    std::memset(hi(d), 0, 4 * N * W * sizeof(A));
    if (args.h0 == nullptr) continue;
    unpacked(d, [&](int64_t i, A* h) { *h = static_cast<const A*>(args.h0)[i]; });
  }
  for (int64_t t = 0; t < args.L; t += K) {
    const int64_t steps = args.L - t < K ? args.L - t : K;
    for (int64_t d = d0; d < d1; d += W) {
      const int64_t row = (b * args.L + t) * args.D + d;
      const bool turn = d + W >= d1;  // the next block is the first channels', later
      const int64_t next = turn ? row + K * args.D + d0 - d : row + W;
      const int64_t rows = !turn ? steps : args.L - t - K < K ? args.L - t - K : K;
      const Ahead<T> ahead{static_cast<const T*>(args.x) + next, static_cast<T*>(args.y) + next, args.D, rows, 0};
      forward_block<T>(args, tables, steps, d, static_cast<const T*>(args.x) + row, static_cast<T*>(args.y) + row,
                       hi(d), lo(d), ahead);
    }
  }
  for (int64_t d = d0; d < d1; d += W) unpacked(d, [&](int64_t i, A* h) { static_cast<A*>(args.h)[i] = *h; });
}

template <class T>
void forward(const CemaForward& args) {
  using A = stat_t<T>;
  TileTables<A> tables;
  A* states = tables.place(args.workspace, args);
  const Parameters<A> parameters = Parameters<A>::of(args);
  parallel_for(args.columns(), 1 + 256 / (kColumn * args.N), [&](int64_t begin, int64_t end) {
    for_vectors<A>(args, begin, end, [&](int64_t d) {
      for (int64_t i = 0; i < kLanes<A>; i += kDoubles) {
        tables.make(parameters, static_cast<const A*>(args.omega), d, i,
                    args.L >= CemaShape::kForward ? CemaShape::kForward : 0);
      }
    });
  });
  const Parts parts = args.parts();
  parallel_for(parts.parts * args.columns(), 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for_columns(args, begin, end, [&](int64_t part, int64_t first, int64_t last) {
      for_stages(args, first, last, [&](int64_t d0, int64_t d1) {
        for (int64_t b = parts.begin(part); b < parts.end(part); ++b) {
          forward_row<T>(args, tables, b, d0, d1, states + part * args.wavelets() * 4);
        }
      });
    });
  });
}

// ---- backward ----

// The workspace behind the tables, of one part: states and sums in float64, checkpoints and packed copies in A.
template <class A>
struct Scratch {
  double* H;       // [D, N, 2]: h', then the adjoint m
  double* sums;    // [D, N, kSums]
  double* omega;   // [D]
  A* checkpoints;  // [blocks, D, N, 2]
  A* packed;       // [columns, 3, kColumn, kBackward + 1]
  int64_t wavelets;

  Scratch(double* memory, const CemaShape& shape, int64_t part) : wavelets(shape.wavelets()) {
    const int64_t parts = shape.parts().parts;
    const int64_t channels = shape.columns() * kColumn;
    H = memory + part * wavelets * 2;
    sums = memory + parts * wavelets * 2 + part * wavelets * kSums;
    omega = memory + parts * wavelets * (2 + kSums) + part * channels;
    A* rest = reinterpret_cast<A*>(memory + parts * (wavelets * (2 + kSums) + channels));
    checkpoints = rest + part * shape.blocks() * wavelets * 2;
    packed = rest + parts * shape.blocks() * wavelets * 2 + part * channels * 3 * (CemaShape::kBackward + 1);
  }
  A* checkpoint(int64_t block, int64_t d, int64_t N) const { return checkpoints + (block * wavelets + d * N) * 2; }
};

constexpr int64_t kSteps = CemaShape::kBackward;

// Keeps the state at the block's start and advances it to the end. x: packed.
template <class A>
void checkpoint_block(const CemaBackward& args, const Tables<A>& tables, const Scratch<A>& scratch, int64_t block,
                      int64_t steps, int64_t d, const A* x) {
  constexpr int64_t W = kLanes<A>;
  for_wavelets<kGroup>(args.N, [&](auto group, int64_t n) {
    constexpr int G = group.value;
    double* H = scratch.H + (d * args.N + n * W) * 2;
    A* kept = scratch.checkpoint(block, d, args.N) + 2 * n * W;
    alignas(64) A state[2 * G * W];
    for (int k = 0; k < G; ++k) round_state(H + 2 * k * W, kept + 2 * k * W);
    std::memcpy(state, kept, sizeof state);
    advance_block<A, G, false>(tables.narrow_of(d, n), state, x, nullptr, steps);
    for (int k = 0; k < G; ++k) {
      carry(tables.narrow_of(d, n + k), tables.wide_of(d, n + k), steps, steps == kSteps, false, state + 2 * k * W,
            H + 2 * k * W);
    }
  });
}

// x, dy, dx: packed.
template <class A>
void backward_block(const CemaBackward& args, const Tables<A>& tables, const Scratch<A>& scratch, int64_t block,
                    int64_t steps, int64_t d, const A* x, const A* dy, A* dx) {
  constexpr int64_t W = kLanes<A>;
  alignas(64) A kept[2 * kAdjointGroup * (kSteps + 1) * W];
  const Vec<A> omega = load(static_cast<const A*>(args.omega) + d, args.D - d);
  Vec<A> domega = {};
  for (int64_t t = 0; t < steps; ++t) {
    store(dx + t * W, omega * load(dy + t * W));
    domega = load(x + t * W) * load(dy + t * W) + domega;
  }
  alignas(64) A rounded[kSums * kAdjointGroup * W];
  store(rounded, domega);
  for (int64_t i = 0; i < W; i += kDoubles) {
    store(scratch.omega + d + i, load(scratch.omega + d + i) + load_wide(rounded + i));
  }

  for_wavelets<kAdjointGroup>(args.N, [&](auto group, int64_t n) {
    constexpr int G = group.value;
    alignas(64) A a[G * W], m[2 * G * W];
    double* M = scratch.H + (d * args.N + n * W) * 2;
    for (int k = 0; k < G; ++k) {
      const double* from = tables.wide_of(d, n + k) + kA * W;
      for (int64_t i = 0; i < W; i += kDoubles) store_wide(a + k * W + i, load(from + i));
      round_state(M + 2 * k * W, m + 2 * k * W);
    }
    A* start = scratch.checkpoint(block, d, args.N) + 2 * n * W;
    advance_block<A, G, true>(tables.narrow_of(d, n), start, x, kept, steps);
    adjoint_block<A, G>(tables.narrow_of(d, n), a, kept, m, x, dy, dx, rounded, steps);
    for (int k = 0; k < G; ++k) {
      carry(tables.narrow_of(d, n + k), tables.wide_of(d, n + k), steps, steps == kSteps, true, m + 2 * k * W,
            M + 2 * k * W);
    }
    double* sums = scratch.sums + (d * args.N + n * W) * kSums;
    for (int64_t i = 0; i < kSums * G * W; i += kDoubles) store(sums + i, load(sums + i) + load_wide(rounded + i));
  });
}

// One row of the batch, the columns [first, last).
template <class T>
void backward_row(const CemaBackward& args, const Tables<stat_t<T>>& tables, const Scratch<stat_t<T>>& scratch,
                  int64_t b, int64_t first, int64_t last) {
  using A = stat_t<T>;
  constexpr int64_t kRoom = room_of<A>(kSteps);
  const int64_t state = args.D * args.N * 2;
  const auto of_row = [&](const void* p) { return p == nullptr ? nullptr : static_cast<const A*>(p) + b * state; };
  A* x = scratch.packed + first * kColumn * 3 * (kSteps + 1);
  const int64_t array =
      (last - first < CemaShape::kStaged ? last - first : CemaShape::kStaged) * kColumn * (kSteps + 1);
  A *dy = x + array, *dx = dy + array;
  // Calls body(offset of the first element, first and last channel, steps) for the stages of a block.
  const auto for_block = [&](int64_t block, auto&& body) {
    const int64_t steps = args.L - block * kSteps < kSteps ? args.L - block * kSteps : kSteps;
    for_stages(args, first, last, [&](int64_t d0, int64_t d1) {
      const int64_t offset = (b * args.L + block * kSteps) * args.D + d0;
      pack(static_cast<const T*>(args.x) + offset, args.D, d1 - d0, steps, kRoom, x);
      body(offset, d0, d1, steps);
    });
  };

  for_vectors<A>(args, first, last,
                 [&](int64_t d) { read_state(of_row(args.h0), tables, args, d, true, scratch.H + d * args.N * 2); });
  for (int64_t block = 0; block < args.blocks(); ++block) {
    for_block(block, [&](int64_t, int64_t d0, int64_t d1, int64_t steps) {
      for (int64_t d = d0, at = 0; d < d1; d += kLanes<A>, at += kRoom) {
        checkpoint_block(args, tables, scratch, block, steps, d, x + at);
      }
    });
  }
  for_vectors<A>(args, first, last,
                 [&](int64_t d) { read_state(of_row(args.dh), tables, args, d, false, scratch.H + d * args.N * 2); });
  for (int64_t block = args.blocks(); block-- > 0;) {
    for_block(block, [&](int64_t offset, int64_t d0, int64_t d1, int64_t steps) {
      pack(static_cast<const T*>(args.dy) + offset, args.D, d1 - d0, steps, kRoom, dy);
      for (int64_t d = d0, at = 0; d < d1; d += kLanes<A>, at += kRoom) {
        backward_block(args, tables, scratch, block, steps, d, x + at, dy + at, dx + at);
      }
      unpack(dx, args.D, d1 - d0, steps, kRoom, static_cast<T*>(args.dx) + offset);
    });
  }
  if (args.dh0 == nullptr) return;
  for_vectors<A>(args, first, last, [&](int64_t d) {
    write_state(static_cast<A*>(args.dh0) + b * state, tables, args, d, false, scratch.H + d * args.N * 2);
  });
}

// From the sums to the raw parameters, for kDoubles channels from d on.
template <class A>
void finish_gradients(const CemaBackward& args, double* memory, int64_t d) {
  constexpr int64_t W = kLanes<A>;
  const Parameters<A> parameters = Parameters<A>::of(args);
  const int64_t lanes = parameters.lanes(d);
  const int64_t N = args.N;
  const int64_t vector = d / W * W;  // the vector of channels these are in
  const double scale = gamma_scale(N);
  const Sigmoid<Double> frequency = parameters.frequency(d);
  const auto scatter = [&](void* out, int64_t offset, int64_t stride, Double v) {
    for (int64_t l = 0; l < lanes; ++l) static_cast<A*>(out)[offset + (d + l) * stride] = static_cast<A>(v[l]);
  };
  Double dtheta = {}, domega = {};
  for (int64_t n = 0; n < N; ++n) {
    Double total[kSums] = {};
    for (int64_t part = 0; part < args.parts().parts; ++part) {
      const double* sums = Scratch<A>(memory, args, part).sums + (vector * N + n * W) * kSums + (d - vector);
      for (int64_t s = 0; s < kSums; ++s) total[s] += load(sums + s * W);
    }
    const Wavelet<Double> w = parameters.wavelet(d, n, frequency);
    const Complex<Double> gamma = parameters.gamma_of(d, n);
    const Double a = w.a() < kLeastInput ? splat(kLeastInput) : w.a();
    WaveletSums<Double> s{};
    s.add_q(w, a * total[kSumQ], a * total[kSumQ + 1]);
    s.g_re = a * total[kSumG];
    s.g_im = a * total[kSumG + 1];
    s.a = total[kSumA];
    const auto gradient = WaveletGradient<Double>::of(w, s, gamma.re, gamma.im, scale);
    scatter(args.dalpha, n, N, gradient.alpha);
    scatter(args.ddelta, n, N, gradient.delta);
    scatter(args.dgamma, 2 * n, 2 * N, gradient.gamma_re);
    scatter(args.dgamma, 2 * n + 1, 2 * N, gradient.gamma_im);
    dtheta += gradient.theta;
  }
  for (int64_t part = 0; part < args.parts().parts; ++part) domega += load(Scratch<A>(memory, args, part).omega + d);
  scatter(args.dtheta, 0, 1, dtheta);
  scatter(args.domega, 0, 1, domega);
}

template <class T>
void backward(const CemaBackward& args) {
  using A = stat_t<T>;
  Tables<A> tables;
  double* memory = tables.place(args.workspace, args);
  tables.make(args, true, args.L >= kSteps ? kSteps : 0);
  const Parts parts = args.parts();
  parallel_for(parts.parts * args.columns(), 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for_columns(args, begin, end, [&](int64_t part, int64_t first, int64_t last) {
      const Scratch<A> scratch(memory, args, part);
      const int64_t channels = (last - first) * kColumn;
      std::memset(scratch.sums + first * kColumn * args.N * kSums, 0, channels * args.N * kSums * sizeof(double));
      std::memset(scratch.omega + first * kColumn, 0, channels * sizeof(double));
      for (int64_t b = parts.begin(part); b < parts.end(part); ++b) {
        backward_row<T>(args, tables, scratch, b, first, last);
      }
    });
  });
  parallel_for(args.columns(), 1 + 256 / (kColumn * args.N), [&](int64_t begin, int64_t end) {
    for (int64_t d = begin * kColumn; d < end * kColumn && d < args.D; d += kDoubles) {
      finish_gradients<A>(args, memory, d);
    }
  });
}

}  // namespace

void cema_forward(const CemaForward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return is_short(args) ? forward_short<T>(args) : forward<T>(args);
  });
}

void cema_backward(const CemaBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_cema_forward_outputs(const DLTensor* x, const DLTensor* alpha, const DLTensor* delta,
                                              const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                              const DLTensor* h0, const DLTensor* cu_seqlens, const char* algorithm,
                                              megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("cema");
    check_cema(c, x, alpha, delta, theta, gamma, omega, h0, cu_seqlens, algorithm, Outputs(outputs));
  });
}

extern "C" int megalodon_cema_forward(const DLTensor* x, const DLTensor* alpha, const DLTensor* delta,
                                      const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                      const DLTensor* h0, const DLTensor* cu_seqlens, const char* algorithm,
                                      DLTensor* y, DLTensor* h, DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("cema");
    const CemaForward args =
        check_cema(c, x, alpha, delta, theta, gamma, omega, h0, cu_seqlens, algorithm, {y, h, workspace});
    run_on(c, args, args.algorithm == CemaAlgorithm::kFft ? cpu::cema_fft_forward : cpu::cema_forward,
           cuda::cema_forward, stream);
  });
}

extern "C" int megalodon_cema_backward_outputs(const DLTensor* dy, const DLTensor* dh, const DLTensor* x,
                                               const DLTensor* alpha, const DLTensor* delta, const DLTensor* theta,
                                               const DLTensor* gamma, const DLTensor* omega, const DLTensor* h0,
                                               const DLTensor* cu_seqlens, const char* algorithm,
                                               megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("cema_backward");
    check_cema_backward(c, dy, dh, x, alpha, delta, theta, gamma, omega, h0, cu_seqlens, algorithm, Outputs(outputs));
  });
}

extern "C" int megalodon_cema_backward(const DLTensor* dy, const DLTensor* dh, const DLTensor* x, const DLTensor* alpha,
                                       const DLTensor* delta, const DLTensor* theta, const DLTensor* gamma,
                                       const DLTensor* omega, const DLTensor* h0, const DLTensor* cu_seqlens,
                                       const char* algorithm, DLTensor* dx, DLTensor* dalpha, DLTensor* ddelta,
                                       DLTensor* dtheta, DLTensor* dgamma, DLTensor* domega, DLTensor* dh0,
                                       DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("cema_backward");
    const CemaBackward args =
        check_cema_backward(c, dy, dh, x, alpha, delta, theta, gamma, omega, h0, cu_seqlens, algorithm,
                            {dx, dalpha, ddelta, dtheta, dgamma, domega, dh0, workspace});
    run_on(c, args, args.algorithm == CemaAlgorithm::kFft ? cpu::cema_fft_backward : cpu::cema_backward,
           cuda::cema_backward, stream);
  });
}
#endif

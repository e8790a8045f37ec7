// cema on the CPU, by the recurrence ("scan").
//
// Computes  h_t = a x_t + q h_(t-1), y_t = Re sum_n g_n h_(t,n) + omega x_t (ops/cema.h); equation
//           (2) of arXiv 2404.08801 as the released code has it.
// Layout    x, y, dy, dx [B, L, D]; parameters [D, N], [D], [D, N, 2]; states [B, D, N, 2]; all compact.
// Mapping   a task is a part of the sequences and a range of columns (16 channels, one or more vectors). It takes a few
//           columns at a time through time, in blocks of 128 steps, and in each block column after column, so that
//           memory is read in order, the tables stay in L2 and a block in L1. A block is 16 tiles, worked on as small
//           products, several tiles and wavelets in registers (cema_tiles.h). What the next block reads is fetched
//           meanwhile; outputs larger than the caches go past them. Of packed rows, many short segments that start
//           from zeros are convolutions instead (cema_segments.h).
// Traffic   2 elements moved and 4 N + 4 N / T + (T + 1) / 2 FMA per element, T = 8: 76 at N = 16, compute-bound.
// Numerics  coefficients from the raw parameters in float64, rounded once. Inside a block the scan's type (float32, or
//           float64 for float64 x); between blocks a float32 state is a sum of two numbers, and what was carried in is
//           corrected for the rounding of q^T, so that it does not add up over L. Subnormal numbers count as zeros
//           (core/subnormals.h). A forward pass of a few steps, as in decoding, runs over the wavelets of a channel
//           instead (cema_short.h). The backward pass is in cema_backward.cpp.
// Limits    none on B, L, D; N >= 1.
#include "ops/cema.h"

#include "ops/cema_segments.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t K = CemaShape::kBlock, kLongest = K + K / 2;  // a segment of so many steps is one block

// The running state of one vector of channels, hi + lo, each [N, 2, lanes].
template <class A>
struct State {
  A *hi, *lo;
  State(A* memory, int64_t d, int64_t N) : hi(memory + d * N * 4), lo(hi + 2 * N * kLanes<A>) {}
};

// One block of one vector of channels, from state 0 with `ahead` steps of x = 0 before the first. x, y: its first row.
template <class T>
void forward_block(const CemaForward& args, const TileTables<stat_t<T>>& tables, int64_t ahead, int64_t steps,
                   int64_t d, const T* x, T* y, State<stat_t<T>> state, Next<T> next) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  alignas(64) A packed[kLongest * W], sums[kLongest * W], states[kLongest / kTile * kKept * 2 * W];
  const int64_t lanes = args.D - d < W ? args.D - d : W, N = args.N, rest = (ahead + steps) % kTile;
  const int64_t tiles = ceil_div(ahead + steps, kTile);
  std::memset(packed, 0, ahead * W * sizeof(A));
  pack(x, args.D, lanes, steps, packed + ahead * W);
  if (rest != 0) std::memset(packed + (ahead + steps) * W, 0, (kTile - rest) * W * sizeof(A));
  next.each = ceil_div(next.rows, ceil_div(N, kKept) * ceil_div(tiles, kTogether));
  const TileStates block{tiles, kKept};
  const bool direct = lanes == W, past = next.out == nullptr;
  const int64_t aside = ahead != 0 ? 0 : rest != 0 ? block.last() : -1;  // of tiles that are not whole, the first
  respond<A, kAhead>(tables.response(d), packed, tiles, sums);
  for (int64_t n = 0; n < N; n += kKept) {
    const TileStates of{tiles, N - n < kKept ? N - n : kKept};
    for_wavelets<kPaired>(of.group, [&](auto paired, int64_t i) {
      constexpr int G = paired.value;
      alignas(64) A end[2 * G * W];
      const A* table = tables.row(d, n + i);
      A *hi = state.hi + 2 * (n + i) * W, *lo = state.lo + 2 * (n + i) * W;
      std::memcpy(end, hi, sizeof end);
      advance_block<A, kAhead, true, G>(table, packed, of.from(i), end, states, rest != 0);
      if (rest != 0) {
        finish_tile<A, G>(table, tables.exact_q(d, n + i), packed + (steps - rest) * W, rest,
                          states + of.from(i).at(tiles - 1) * W, of.stride(tiles - 1), hi);
        return;
      }
      for (int g = 0; g < G; ++g, hi += 2 * W, lo += 2 * W) {
        carry(table + g * kRow * W, steps == K, end + 2 * g * W, hi, lo);
      }
    });
    output_block<A, kAhead>(tables.row(d, n), states, of, sums,
                            direct && n + of.group == N ? y - ahead * args.D : nullptr, args.D, past, aside,
                            [&] { next.fetch(); });
  }
  if (direct && aside < 0) return;
  const int64_t from = direct ? (ahead != 0 ? ahead : aside * kTile) : ahead;
  const int64_t to = direct && ahead != 0 ? block.behind_first() * kTile : ahead + steps;
  unpack(sums + from * W, args.D, lanes, to - from, past, y + (from - ahead) * args.D);
}

// Sequence i, the channels [d0, d1).
template <class T>
void forward_sequence(const CemaForward& args, const TileTables<stat_t<T>>& tables, int64_t i, int64_t d0, int64_t d1,
                      stat_t<T>* states) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const auto* x = static_cast<const T*>(args.x);
  auto* y = static_cast<T*>(args.y);
  for (int64_t d = d0; d < d1; d += W) {
    const State<A> state(states, d, args.N);
    std::memset(state.hi, 0, 4 * args.N * W * sizeof(A));
    if (args.h0 != nullptr) load_state<A>(args, args.h0, i, d, state.hi, false);
  }
  const int64_t all = args.sequences.tokens(), begin = args.sequences.begin(i), end = args.sequences.end(i);
  const bool past = goes_past_caches(all * args.D, args.D, y);
  // From zeros steps of x = 0 lead to the first whole tile, and tiles are whole from there on.
  int64_t ahead = args.h0 == nullptr ? round_up(end - begin, kTile) - (end - begin) : 0;
  const int64_t block = args.h0 == nullptr && ahead + end - begin <= kLongest ? kLongest : K;
  for (int64_t t = begin, steps; t < end; t += steps, ahead = 0) {
    steps = std::min(end - t, block - ahead);
    for (int64_t d = d0; d < d1; d += W) {
      const int64_t row = t * args.D + d;
      const bool turn = d + W >= d1;  // the next block is the first channels', later: of the next sequence, maybe
      const int64_t later = turn ? row + steps * args.D + d0 - d : row + W, left = all - t - steps;
      const Next<T> next{x + later, nullptr, past ? nullptr : y + later, args.D, !turn ? steps : left < K ? left : K};
      forward_block<T>(args, tables, ahead, steps, d, x + row, y + row, State<A>(states, d, args.N), next);
    }
  }
  const bool states_past = states_go_past(args, static_cast<const A*>(args.h));
  for (int64_t d = d0; d < d1; d += W) {
    store_state<A>(args, State<A>(states, d, args.N).hi, i, d, args.h, false, states_past);
  }
}

// Short segments, the channels [d0, d1).
template <class T>
void forward_run(const CemaForward& args, const SegmentTables<stat_t<T>>& tables, const SegmentRun& run, int64_t d0,
                 int64_t d1) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t D = args.D, pairs = 2 * args.N, all = args.sequences.tokens();
  const auto* x = static_cast<const T*>(args.x);
  auto* y = static_cast<T*>(args.y);
  auto* h = static_cast<A*>(args.h);
  const bool past = goes_past_caches(all * D, D, y), states_past = states_go_past(args, h);
  alignas(64) A packed[SegmentRun::kRows * W];
  for (int64_t d = d0; d < d1; d += W) {
    const int64_t lanes = D - d < W ? D - d : W;
    run.pack(x + d, D, lanes, packed);
    for (int64_t i = 0; i < run.count; ++i) {
      const SegmentRun::Segment& s = run.list[i];
      Next<T> next = run.next<T>(s, x, nullptr, all, D, d, d0, d1);
      convolve<T, kAhead>(tables.kernel_of(d), packed + s.row * W, s.steps, D, lanes, past, y + s.begin * D + d,
                          [&] { next.fetch(); });
    }
    for (int64_t l = 0; l < lanes; ++l) {
      const A* table = tables.entering_of(d + l);
      if (states_past) {
        last_states<A, true>(table, args.N, packed + l, run, h + (d + l) * pairs, D * pairs);
      } else {
        last_states<A, false>(table, args.N, packed + l, run, h + (d + l) * pairs, D * pairs);
      }
    }
  }
}

template <class T>
void forward(const CemaForward& args) {
  using A = stat_t<T>;
  SegmentTables<A> tables;
  A* states = tables.place(args.workspace, args, args.most_short(), args.h0 == nullptr, false);
  with_tables(args, tables, [&](int64_t part, int64_t d0, int64_t d1, const SegmentTables<A>& own) {
    for_segments(
        args.sequences, args.first(part), args.first(part + 1), own.steps,
        [&](const SegmentRun& run) { forward_run<T>(args, own, run, d0, d1); },
        [&](int64_t i) { forward_sequence<T>(args, own, i, d0, d1, states + part * args.wavelets() * 4); });
  });
}

}  // namespace

void cema_forward(const CemaForward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return is_short(args) ? forward_short<T>(args) : forward<T>(args);
  });
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

// cema_kernel on the GPU. Not yet run on a GPU.
//
// Computes  k_t = Re sum_n c_n q_n^t and its gradients (ops/cema_kernel.h).
// Layout    parameters [D, N], [D], [D, N, 2]; k, dk [D, L]; all compact.
// Mapping   a block of four warps belongs to a channel and a part of its steps, in tiles of 32 spans of 128 steps; 16
//           wavelets at a time. Of t = span + j, shared memory holds q^j; forward also c q^span. A tile of k is then
//           the product of a [32, 32] and a [32, 128] matrix: 8 spans and 4 j per thread. Backward is the adjoint: S
//           and U of a span, 4 spans and one wavelet per thread, are added up with q^span, and over parts and wavelets
//           by a second kernel.
// Traffic   2 N FMA per element forward, 4 N backward, and one element moved: both limits are near at N = 16. Shared
//           memory gives 6 16-byte accesses per 64 FMA. Wavelets that have decayed to 0 cost nothing (backward: where
//           that holds for all of them). A tile's work in double is less than its FMA where there are half as many
//           units for double as for float.
// Numerics  coefficients, powers and sums over spans in double; q^t anew for every tile, at most 15 multiplications by
//           q and 3 by q^128 away; a span in the parameters' type. The error does not grow with L. All in fixed order.
// Limits    none; lengths that are no multiple of 16 bytes, or not so aligned, go element by element; beyond 16
//           wavelets the powers are made again for every tile, and dk is read again.
#include "core/coefficients.cuh"
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "ops/cema_kernel.h"

namespace megalodon::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWavelets = 16;                  // worked on together; threadIdx.x modulo it is the one a thread prepares
constexpr int kGroups = kThreads / kWavelets;  // threads that prepare one together
constexpr int kSteps = 128;                    // of a span: four per lane
constexpr int kRow = kSteps + 4;               // of a table: rows of neighbouring wavelets lie in different banks
constexpr int kSpans = 32;                     // of a tile
constexpr int kTile = kSpans * kSteps;
static_assert(kTile == kCemaKernelTile);
constexpr int kMine = kSpans / kGroups;  // spans whose powers a thread makes
constexpr int kWarpSpans = kSpans / kWarps;

// Steps summed up by themselves, so that the rounding of a span in float is that of a shorter one.
template <class A>
constexpr int kPiece = sizeof(A) == 8 ? kSteps : 32;

// Blocks on a processor: as many registers as that leaves.
template <class A>
constexpr int kBlocks = sizeof(A) == 8 ? 2 : 3;

// Whether a factor still counts in A; NaN does.
template <class A>
DEVICE bool is_live(A re, A im) {
  constexpr A kLeast = sizeof(A) == 8 ? static_cast<A>(0x1p-1022) : static_cast<A>(0x1p-126);
  return !((re < 0 ? -re : re) + (im < 0 ? -im : im) < kLeast);
}

// Powers of the wavelet that a thread prepares together with others.
template <class A>
struct Prepared {
  int n, group;  // the wavelet among the 16, and the thread among its threads
  bool exists;
  Wavelet wavelet;
  Complex c, span;  // its product, and q^kSteps

  DEVICE static Prepared of(const Parameters<A>& parameters, int64_t d, int64_t first) {
    Prepared p{};
    p.n = static_cast<int>(threadIdx.x) % kWavelets;
    p.group = static_cast<int>(threadIdx.x) / kWavelets;
    p.exists = first + p.n < parameters.N;
    if (!p.exists) return p;
    p.wavelet = parameters.wavelet(d, first + p.n);
    p.c = parameters.product(p.wavelet, d, first + p.n);
    p.span = p.wavelet.power(kSteps);
    return p;
  }

  // table[part][n][j] = q^j, part 0 real, 1 imaginary.
  DEVICE void fill(A* table) const {
    if (!exists) return;
    constexpr int kEach = kSteps / kGroups;
    const Complex q = wavelet.power(1);
    Complex v = wavelet.power(group * kEach);
    for (int j = 0; j < kEach; ++j) {
      A* to = table + n * kRow + group * kEach + j;
      to[0] = static_cast<A>(v.re);
      to[kWavelets * kRow] = static_cast<A>(v.im);
      v = v * q;
    }
  }

  // The power at the first of the thread's spans in the tile at t; `span` leads from one to the next.
  DEVICE Complex factor(int64_t t) const { return wavelet.power(static_cast<double>(t + group * kMine * kSteps)); }
};

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocks<A>)
    cema_kernel_forward_kernel(Parameters<A> parameters, A* k, int64_t L, Parts parts, bool packed) {
  DYNAMIC_SHARED(A, table);                   // [2, kWavelets, kRow]
  A* factors = table + 2 * kWavelets * kRow;  // [2, kWavelets, kSpans]: re, -im of c q^span
  const int64_t d = blockIdx.x / parts.parts, part = blockIdx.x % parts.parts, N = parameters.N;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Prepared<A> prepared;
  for (int64_t tile = parts.begin(part); tile < parts.end(part); ++tile) {
    A sums[kWarpSpans][4] = {};
    const int64_t start = tile * kTile + warp * kWarpSpans * kSteps;  // of the warp
    for (int64_t first = 0; first < N; first += kWavelets) {
      sync_block();  // the table and the factors before have been read
      if (tile == parts.begin(part) || N > kWavelets) {
        prepared = Prepared<A>::of(parameters, d, first);
        prepared.fill(table);
      }
      if (prepared.exists) {
        Complex v = prepared.c * prepared.factor(tile * kTile);
        UNROLL
        for (int i = 0; i < kMine; ++i) {
          A* to = factors + prepared.n * kSpans + prepared.group * kMine + i;
          to[0] = static_cast<A>(v.re);
          to[kWavelets * kSpans] = static_cast<A>(-v.im);
          v = v * prepared.span;
        }
      }
      sync_block();  // the table and the factors are there
      const int n = lane % kWavelets;
      bool live = false;  // the warp's first factor of wavelet n, which is its largest
      if (start < L && first + n < N) {
        const A* factor = factors + n * kSpans + warp * kWarpSpans;
        live = is_live(factor[0], factor[kWavelets * kSpans]);
      }
      const unsigned mask = ballot(live);
      for (int w = 0; w < kWavelets; ++w) {
        if ((mask >> w & 1) == 0) continue;
        const Pack<A, 4> re = load<4>(table + w * kRow + 4 * lane);
        const Pack<A, 4> im = load<4>(table + (kWavelets + w) * kRow + 4 * lane);
        const A* factor = factors + w * kSpans + warp * kWarpSpans;
        const Pack<A, kWarpSpans> fre = load<kWarpSpans>(factor), fim = load<kWarpSpans>(factor + kWavelets * kSpans);
        UNROLL
        for (int s = 0; s < kWarpSpans; ++s) {
          UNROLL
          for (int i = 0; i < 4; ++i) {
            sums[s][i] += fre.v[s] * re.v[i];
            sums[s][i] += fim.v[s] * im.v[i];
          }
        }
      }
    }
    UNROLL
    for (int s = 0; s < kWarpSpans; ++s) {
      const int64_t t = start + s * kSteps + 4 * lane;
      A* to = k + d * L + t;
      if (packed && t < L) {
        Pack<A, 4> out;
        UNROLL
        for (int i = 0; i < 4; ++i) out.v[i] = sums[s][i];
        store(to, out);
      } else {
        UNROLL
        for (int i = 0; i < 4; ++i) {
          if (t + i < L) to[i] = sums[s][i];
        }
      }
    }
  }
}

// sums[part, d, n] = S and U of the part's steps.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocks<A>)
    cema_kernel_analysis_kernel(Parameters<A> parameters, const A* dk, double* sums, int64_t L, int64_t D, Parts parts,
                                bool packed) {
  DYNAMIC_SHARED(A, table);                 // [2, kWavelets, kRow]
  A* steps = table + 2 * kWavelets * kRow;  // [kSpans, kRow]: dk of the tile
  SHARED(double, shared, [4][kGroups][kWavelets]);
  const int64_t d = blockIdx.x / parts.parts, part = blockIdx.x % parts.parts, N = parameters.N;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = 0; first < N; first += kWavelets) {
    const auto prepared = Prepared<A>::of(parameters, d, first);
    prepared.fill(table);
    Complex S{0, 0}, U{0, 0};
    for (int64_t tile = parts.begin(part); tile < parts.end(part); ++tile) {
      Complex factor{0, 0};
      if (prepared.exists) factor = prepared.factor(tile * kTile);
      // The largest of the warp's factors, but for wavelets that do not exist.
      const bool live = prepared.exists && is_live(static_cast<A>(factor.re), static_cast<A>(factor.im));
      const bool works = ballot(live) != 0 && prepared.exists;
      sync_block();  // the steps before have been read
      UNROLL
      for (int i = 0; i < kTile / kThreads / 4; ++i) {
        const int at = 4 * (i * kThreads + thread);
        const int64_t t = tile * kTile + at;
        const A* from = dk + d * L + t;
        Pack<A, 4> four = {};
        if (packed && t < L) {
          four = load<4>(from);
        } else {
          UNROLL
          for (int j = 0; j < 4; ++j) {
            if (t + j < L) four.v[j] = from[j];
          }
        }
        store(steps + at / kSteps * kRow + at % kSteps, four);
      }
      sync_block();  // the steps, and at first the table, are there
      if (!works) continue;
      A s_re[kMine] = {}, s_im[kMine] = {}, u_re[kMine] = {}, u_im[kMine] = {};
      for (int piece = 0; piece < kSteps; piece += kPiece<A>) {
        A s_re_piece[kMine] = {}, s_im_piece[kMine] = {}, u_re_piece[kMine] = {}, u_im_piece[kMine] = {};
        for (int j = piece; j < piece + kPiece<A>; j += 4) {
          const Pack<A, 4> re = load<4>(table + prepared.n * kRow + j);
          const Pack<A, 4> im = load<4>(table + (kWavelets + prepared.n) * kRow + j);
          Pack<A, 4> x[kMine];
          UNROLL
          for (int m = 0; m < kMine; ++m) x[m] = load<4>(steps + (prepared.group * kMine + m) * kRow + j);
          UNROLL
          for (int i = 0; i < 4; ++i) {
            const A step = static_cast<A>(j + i);
            const A step_re = step * re.v[i], step_im = step * im.v[i];
            UNROLL
            for (int m = 0; m < kMine; ++m) {
              s_re_piece[m] += x[m].v[i] * re.v[i];
              s_im_piece[m] += x[m].v[i] * im.v[i];
              u_re_piece[m] += x[m].v[i] * step_re;
              u_im_piece[m] += x[m].v[i] * step_im;
            }
          }
        }
        UNROLL
        for (int m = 0; m < kMine; ++m) {
          s_re[m] += s_re_piece[m];
          s_im[m] += s_im_piece[m];
          u_re[m] += u_re_piece[m];
          u_im[m] += u_im_piece[m];
        }
      }
      const auto begin = static_cast<double>(tile * kTile + prepared.group * kMine * kSteps);
      UNROLL
      for (int m = 0; m < kMine; ++m) {
        const double t = begin + m * kSteps;
        const Complex s = factor * Complex{s_re[m], s_im[m]};
        const Complex u = factor * Complex{u_re[m], u_im[m]};
        S = {S.re + s.re, S.im + s.im};
        U = {U.re + (u.re + t * s.re), U.im + (u.im + t * s.im)};
        factor = factor * prepared.span;
      }
    }
    shared[0][prepared.group][prepared.n] = S.re;
    shared[1][prepared.group][prepared.n] = S.im;
    shared[2][prepared.group][prepared.n] = U.re;
    shared[3][prepared.group][prepared.n] = U.im;
    sync_block();  // the sums of every group are there, and the table has been read
    if (prepared.exists && prepared.group < 4) {
      double sum = 0;
      for (int g = 0; g < kGroups; ++g) sum += shared[prepared.group][g][prepared.n];
      sums[((part * D + d) * N + first + prepared.n) * 4 + prepared.group] = sum;
    }
    sync_block();  // and have been read
  }
}

// The gradients of the raw parameters from S and U; a warp per channel.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_kernel_gradients_kernel(Parameters<A> parameters, const double* sums, CemaKernelBackward args, int64_t parts) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y, N = args.N;
  if (d >= args.D) return;
  const double scale = gamma_scale(N);
  double dtheta = 0;
  for (int64_t n = threadIdx.x; n < N; n += 32) {
    const int64_t at = d * N + n;
    double total[4] = {};
    for (int64_t part = 0; part < parts; ++part) {
      UNROLL
      for (int i = 0; i < 4; ++i) total[i] += sums[(part * args.D * N + at) * 4 + i];
    }
    const Wavelet w = parameters.wavelet(d, n);
    const Complex gamma = parameters.gamma_of(d, n);
    const Complex cU = parameters.product(w, d, n) * Complex{total[2], total[3]};
    const double c_re = total[0], c_im = -total[1];  // dS/dc
    const double drho = cU.re / (w.rho < Wavelet::kLeast ? Wavelet::kLeast : w.rho), dphi = -cU.im;
    const double from_c = scale * (gamma.re * c_re + gamma.im * c_im);
    static_cast<A*>(args.dalpha)[at] = static_cast<A>(w.alpha.slope() * (from_c - w.delta.value * drho));
    static_cast<A*>(args.ddelta)[at] = static_cast<A>(-(w.alpha.value * w.delta.slope() * drho));
    static_cast<A*>(args.dgamma)[2 * at] = static_cast<A>(scale * (w.alpha.value * c_re));
    static_cast<A*>(args.dgamma)[2 * at + 1] = static_cast<A>(scale * (w.alpha.value * c_im));
    dtheta += static_cast<double>(n + 1) / static_cast<double>(N) * kTwoPi * w.theta.slope() * dphi;
  }
  dtheta = warp_sum(dtheta);
  if (threadIdx.x == 0) static_cast<A*>(args.dtheta)[d] = static_cast<A>(dtheta);
}

dim3 grid_of(int64_t D, const Parts& parts) { return dim3(static_cast<unsigned>(D * parts.parts)); }

// Whether four steps at a time may be moved.
template <class A>
bool is_packed(const void* steps, int64_t L) {
  return L % 4 == 0 && can_pack<A>(L, steps);
}

constexpr int64_t kTableElements = 2 * kWavelets * kRow;

template <class A>
void forward(const CemaKernelForward& args, void* stream) {
  const Parts parts = cema_kernel_parts(args.D, args.L);
  const int64_t bytes = (kTableElements + 2 * kWavelets * kSpans) * static_cast<int64_t>(sizeof(A));
  launch({"cema_kernel_forward", grid_of(args.D, parts), dim3(kThreads), bytes, stream}, cema_kernel_forward_kernel<A>,
         Parameters<A>::of(args), static_cast<A*>(args.k), args.L, parts, is_packed<A>(args.k, args.L));
}

template <class A>
void backward(const CemaKernelBackward& args, void* stream) {
  const Parts parts = cema_kernel_parts(args.D, args.L);
  const auto parameters = Parameters<A>::of(args);
  auto* sums = static_cast<double*>(args.workspace);
  const int64_t bytes = (kTableElements + kSpans * kRow) * static_cast<int64_t>(sizeof(A));
  launch({"cema_kernel_analysis", grid_of(args.D, parts), dim3(kThreads), bytes, stream},
         cema_kernel_analysis_kernel<A>, parameters, static_cast<const A*>(args.dk), sums, args.L, args.D, parts,
         is_packed<A>(args.dk, args.L));
  launch({"cema_kernel_gradients", dim3(static_cast<unsigned>(ceil_div(args.D, kWarps))), dim3(32, kWarps), 0, stream},
         cema_kernel_gradients_kernel<A>, parameters, sums, args, parts.parts);
}

}  // namespace

void cema_kernel_forward(const CemaKernelForward& args, void* stream) {
  if (args.D == 0 || args.L == 0) return;
  visit_stat(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args, stream); });
}

void cema_kernel_backward(const CemaKernelBackward& args, void* stream) {
  if (args.D == 0) return;
  visit_stat(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args, stream); });
}

}  // namespace megalodon::cuda

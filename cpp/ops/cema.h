// cema: the complex exponential moving average (arXiv 2404.08801, as released), per channel d with N wavelets:
//   h_t = a x_t + q h_(t-1)                        complex, h_(-1) = h0 or 0
//   y_t = Re sum_n g_n h_(t,n) + omega x_t
// with a, q, g from the raw parameters as core/coefficients.h says. h is the last state.
//
// With cu_seqlens, x, y, dy and dx are one packed row [1, T, D] of S segments (core/sequences.h): all of the above
// holds in each of them, and h0, h, dh and dh0 have a row for each.
//
// Backward, with l_t = dS/dh_t as the pair (dS/d re, dS/d im) read as a complex number:
//   l_t = conj(g) dy_t + conj(q) l_(t+1),   l_(L-1) = conj(g) dy_(L-1) + dh
//   dx_t = sum_n a Re l_t + omega dy_t,     dh0 = conj(q) l_0
//   dS/dq = sum_t l_t conj(h_(t-1)),  dS/dg = sum_t dy_t conj(h_t),  dS/da = sum_t x_t Re l_t,  domega = sum_t dy_t
//   x_t.
#pragma once

#include <string>

#include "core/fft.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/powers.h"
#include "core/sequences.h"
#include "core/tensor.h"
#include "ops/cema_cut.h"
#include "ops/cema_fft.h"
#include "ops/cema_mma.h"

namespace megalodon {

enum class CemaAlgorithm : int32_t { kScan, kFft };

// The sizes, and the way the scan cuts them: by shape alone, so that the workspace does not depend on the machine.
struct CemaShape {
  Sequences sequences;
  int64_t D, N;

  static constexpr int64_t kColumn = 16;               // channels worked on together, padded with zeros at the end of D
  static constexpr int64_t kBlock = 128;               // steps of a time block
  static constexpr int64_t kLeastPart = 1024;          // tokens of a part of segments
  static constexpr int64_t kStaged = 4;                // columns packed at a time
  static constexpr int64_t kTile = 8;                  // steps of a tile of a block, forward
  static constexpr int64_t kTableRow = 4 * kTile + 6;  // numbers per wavelet in the table of coefficients
  static constexpr int64_t kUnit = 16, kMostShort = 128;          // steps, of short segments (cema_segments.h)
  static constexpr int64_t kSums = 11, kChannelSums = kTile + 1;  // of gradients, per wavelet and per channel

  int64_t columns() const { return (D + kColumn - 1) / kColumn; }
  // Parts of the sequences, one of which a task walks through, sequence after sequence: few columns need more tasks to
  // occupy the threads. Each has sums of its own, so that segments make no parts of few tokens. Parts are alike in
  // tokens and sequences; part p begins with sequence first(p).
  int64_t parts() const {
    const int64_t wanted = columns() > 0 ? ceil_div(Parts::kMaxParts, columns()) : 1;
    const int64_t large = sequences.packed ? ceil_div(sequences.length, kLeastPart) : sequences.count;
    const int64_t most = large < sequences.count ? large : sequences.count;
    return wanted < most ? wanted : most > 0 ? most : 1;
  }
  int64_t first(int64_t part) const {
    return part == parts() ? sequences.count : sequences.piece(sequences.pieces(1) * part / parts(), 1).sequence;
  }
  // Time blocks of a sequence, of all parts: of the longest possible, or as many as the tokens of all parts have.
  int64_t blocks() const {
    const int64_t longest = ceil_div(sequences.length, kBlock);
    return sequences.packed ? sequences.length / kBlock + parts() : parts() * longest;
  }
  int64_t first_block(int64_t part) const {
    return sequences.packed ? sequences.begin(first(part)) / kBlock + part : part * ceil_div(sequences.length, kBlock);
  }
  int64_t wavelets() const { return columns() * kColumn * N; }  // (d, n) pairs, padding included
  int64_t padded_pairs() const { return round_up(2 * N, 16); }  // numbers of a channel's states, in vectors
  // The steps of the longest segments that are convolved, where states before and gradients of states are none.
  int64_t most_short(int64_t most, int64_t steps_per_wavelet) const {
    const int64_t steps = sequences.packed ? steps_per_wavelet * N / kTile * kTile : 0;
    return steps < most ? steps : most;
  }

  // The fft algorithm, of rows alone: points of the transform, constants, and tasks with `arrays` transformed arrays
  // and `rows` rows of sums per wavelet besides the response, its coefficients and sums, and what a state adds to the
  // output.
  // The length is L, unless there is nothing of that length.
  int64_t fft_length() const { return sequences.count * D == 0 ? 0 : sequences.length; }
  int64_t fft_size() const { return fft_points(fft_length()); }
  int64_t fft_table(DType dtype) const { return fft_table_bytes(fft_size(), stat_dtype(dtype)); }
  ChannelTasks fft_tasks(DType dtype, int64_t arrays, int64_t rows) const {
    const int64_t own = powers_bytes(N) + wavelet_rows_bytes(N, 2) + wavelet_rows_bytes(N, 4) +
                        fft_array_bytes(fft_size()) + fft_length() * kMaxVectorBytes;
    return ChannelTasks::of(D, stat_dtype(dtype),
                            own + arrays * fft_array_bytes(fft_size()) + wavelet_rows_bytes(N, rows));
  }
};

// How the GPU cuts the scan, by shape alone. A block of threads walks through the time of a tile of channels; a
// channel's wavelets are shared by `lanes` threads.
struct CemaCudaPlan {
  static constexpr int64_t kThreads = 128;  // of a block: a warp for each scheduler of a processor
  static constexpr int64_t kEach = 4;       // wavelets of a thread
  static constexpr int64_t kMostLanes = 8;  // 16 would need more registers than there are
  // Cutting time costs up to 10 N FMA per element in the place of 6 N.
  static constexpr int64_t kFewBlocks = 99, kLeastPiece = 256;
  static constexpr int64_t kFewParts = 16;  // sums of gradients that one thread adds up

  int64_t lanes;
  int64_t tiles;  // of channels
  CemaCut cut;

  static CemaCudaPlan of(const CemaShape& shape) {
    int64_t lanes = 1;
    while (lanes < kMostLanes && lanes * kEach < shape.N) lanes *= 2;
    const int64_t tiles = ceil_div(shape.D, kThreads / lanes);
    return {lanes, tiles, CemaCut::of(shape.sequences, tiles, kFewBlocks, kLeastPiece, kLeastPiece / 2)};
  }
  int64_t parts() const { return cut.parts.parts; }  // blocks that sum up the same parameters' gradients
  // Wavelets are worked on in groups of at most kMostLanes * kEach: each adds to the outputs of the one before.
  static bool has_groups(int64_t N) { return N > kMostLanes * kEach; }
};

// A forward pass of a few steps, as in decoding: a lane per wavelet, nothing in the workspace.
constexpr int64_t kCemaCudaShortSteps = 16;
constexpr int64_t kCemaCudaShortWavelets = 64;

// What auto means, by measurement: float32, one thread, AVX-512 with one FMA unit of that width, D = 128 to 512.
//   forward   the scan, which gives the last state without further cost: 20, 59, 99 and 149 cycles for 16 elements at
//             N = 1, 8, 16 and 24, where two transforms and the sums for the state take about 150.
//   backward  without states, the transforms from N = 16 on: fft / scan is 0.55 to 0.87 at N = 16 (L 256 to 16384, B 2
//             and 8) and 0.64 at N = 24, but 1.13 to 1.20 at N = 8 and 2.8 at N = 1. With dh or h0, the scan: the sums
//             from and to the states cost 4 N to 8 N more.
constexpr int64_t kFftBackwardWavelets = 16;
constexpr int64_t kFftBackwardSteps = 256;

struct CemaForward : CemaShape {
  DType dtype;  // of x and y
  CemaAlgorithm algorithm;
  const void* x;      // [B, L, D]
  const void* alpha;  // [D, N] stat, as all that follows
  const void* delta;  // [D, N]
  const void* theta;  // [D]
  const void* gamma;  // [D, N, 2]
  const void* omega;  // [D]
  const void* h0;     // [B, D, N, 2], nullptr: zeros
  void* y;            // [B, L, D]
  void* h;            // [B, D, N, 2] stat
  void* workspace;    // scan: see scan_bytes

  // Coefficients (for each wavelet a row and q in float64, for each channel the response of a tile) and the running
  // states, in two numbers each, of every part of the sequences.
  int64_t scan_bytes() const {
    const int64_t stat = size_of(stat_dtype(dtype));
    const int64_t channels = columns() * kColumn;
    const int64_t of_segments = sequences.packed ? channels * (most_short() + (kUnit + 2) * padded_pairs()) : 0;
    return wavelets() * (kTableRow * stat + 2 * 8) + channels * kTile * stat + of_segments * stat +
           parts() * wavelets() * 4 * stat;
  }
  int64_t most_short() const { return CemaShape::most_short(96, 6); }
  int64_t fft_table() const { return CemaShape::fft_table(dtype); }
  ChannelTasks fft_tasks() const { return CemaShape::fft_tasks(dtype, 1, 0); }
  CemaAlgorithm automatic() const { return CemaAlgorithm::kScan; }
  int64_t workspace_bytes() const {
    if (algorithm == CemaAlgorithm::kScan) return scan_bytes();
    return kMaxVectorBytes + fft_table() + fft_tasks().bytes();
  }

  // The GPU: five numbers per wavelet, the states between pieces, and sums over the groups of wavelets so far.
  bool is_short() const { return sequences.length <= kCemaCudaShortSteps && N <= kCemaCudaShortWavelets; }
  bool by_products() const { return CemaMmaPlan::takes(dtype, sequences, N); }
  // By transforms only from zeros on. First in the workspace, the states that pieces end with, and the table.
  bool by_transforms() const { return algorithm == CemaAlgorithm::kFft && h0 == nullptr; }
  CemaFftCudaRoom transform_room() const {
    const int64_t states = (5 + CemaCudaPlan::of(*this).cut.ends() * 2) * D * N * 8;
    return CemaFftCudaRoom::forward(states, dtype, sequences.count, sequences.length, D);
  }
  int64_t cuda_bytes() const {
    if (by_transforms()) return transform_room().bytes;
    if (is_short()) return 0;
    if (by_products()) {
      const CemaMmaPlan plan = CemaMmaPlan::of(sequences, D);
      return plan.cut.places() * D * N * 2 * 8 + plan.table_bytes(N);
    }
    const CemaCudaPlan plan = CemaCudaPlan::of(*this);
    return (5 + plan.cut.places() * 2) * D * N * 8 +
           (CemaCudaPlan::has_groups(N) ? sequences.tokens() * D * size_of(stat_dtype(dtype)) : 0);
  }
};

struct CemaBackward : CemaShape {
  DType dtype;  // of dy, x and dx
  CemaAlgorithm algorithm;
  const void* dy;     // [B, L, D]
  const void* dh;     // [B, D, N, 2] stat, nullptr: zeros
  const void* x;      // [B, L, D]
  const void* alpha;  // as in CemaForward
  const void* delta;
  const void* theta;
  const void* gamma;
  const void* omega;
  const void* h0;  // nullptr: zeros
  void* dx;        // [B, L, D]
  void* dalpha;    // [D, N] stat, as all that follows
  void* ddelta;    // [D, N]
  void* dtheta;    // [D]
  void* dgamma;    // [D, N, 2]
  void* domega;    // [D]
  void* dh0;       // [B, D, N, 2], nullptr when h0 is
  void* workspace;

  // Coefficients as forward and the powers of q within a tile, and for each part: running states in two numbers
  // each and sums of gradients in float64; the state at the start of every time block (2 N / 128 numbers per element of
  // x).
  int64_t scan_bytes() const {
    const int64_t stat = size_of(stat_dtype(dtype)), channels = columns() * kColumn;
    return wavelets() * ((kTableRow + 2 * (kTile - 1)) * stat + 2 * 8) + channels * kTile * stat +
           parts() * (wavelets() * (kSums * 8 + 4 * stat) + channels * kChannelSums * 8) +
           blocks() * wavelets() * 2 * stat + channels * most_short() * (stat + parts() * 8);
  }
  int64_t most_short() const { return CemaShape::most_short(kMostShort, 8); }
  int64_t fft_table() const { return CemaShape::fft_table(dtype); }
  ChannelTasks fft_tasks() const { return CemaShape::fft_tasks(dtype, 3, 7); }
  CemaAlgorithm automatic() const {
    const bool stateless = dh == nullptr && h0 == nullptr;
    const bool large = N >= kFftBackwardWavelets && sequences.length >= kFftBackwardSteps;
    return stateless && large ? CemaAlgorithm::kFft : CemaAlgorithm::kScan;
  }
  int64_t workspace_bytes() const {
    if (algorithm == CemaAlgorithm::kScan) return scan_bytes();
    return kMaxVectorBytes + fft_table() + fft_tasks().bytes();
  }

  // The GPU: as forward, with the adjoint state, the state and its derivative by q between pieces; then the sums of
  // every block, and where these are many their total.
  // By products only dx, and only without h0 and dh, as in training: then dS/da follows from dS/dg, and the scan of the
  // adjoint is spared.
  bool by_products() const { return CemaMmaPlan::takes(dtype, sequences, N) && h0 == nullptr && dh == nullptr; }
  int64_t product_bytes() const {
    const CemaMmaPlan plan = CemaMmaPlan::of(sequences, D);
    return by_products() ? plan.cut.places() * D * N * 2 * 8 + plan.table_bytes(N) : 0;
  }
  int64_t cuda_sums() const { return (5 * N + 1) * D; }  // of a block of every tile
  bool by_transforms() const { return algorithm == CemaAlgorithm::kFft && h0 == nullptr && dh == nullptr; }
  CemaFftCudaRoom transform_room() const {
    return CemaFftCudaRoom::backward(dtype, sequences.count, sequences.length, D, N);
  }
  int64_t cuda_bytes() const {
    if (by_transforms()) return transform_room().bytes;
    const CemaCudaPlan plan = CemaCudaPlan::of(*this);
    return product_bytes() + (5 + plan.cut.places() * 6) * D * N * 8 + (plan.parts() + 1) * cuda_sums() * 8 +
           (CemaCudaPlan::has_groups(N) ? sequences.tokens() * D * size_of(stat_dtype(dtype)) : 0);
  }
};

// What an algorithm means for these arguments. Transforms are of rows alone: a packed row is the scan's.
template <class Args>
static inline CemaAlgorithm check_cema_algorithm(const Checker& c, const char* algorithm, const Args& args) {
  const std::string name = algorithm == nullptr ? "none" : algorithm;
  c.require(name == "auto" || name == "scan" || name == "fft", "algorithm", "auto, scan or fft", name);
  if (name == "scan" || args.sequences.packed) return CemaAlgorithm::kScan;
  if (name == "fft") return CemaAlgorithm::kFft;
  return c.on_cuda() ? CemaAlgorithm::kScan : args.automatic();
}

// The parameters, in the order of both functions; Args is either of the two.
template <class Args>
static inline void check_cema_parameters(Checker& c, Args& args, const Tensor& x, const DLTensor* alpha_in,
                                         const DLTensor* delta_in, const DLTensor* theta_in, const DLTensor* gamma_in,
                                         const DLTensor* omega_in, const DLTensor* cu_seqlens) {
  const DType stat = stat_dtype(x.dtype);
  const Dim D = x.dim(2, "D");
  const Tensor alpha = c.tensor("alpha", alpha_in, stat, {D, any("N")});
  const Dim N = alpha.dim(1, "N");
  c.at_least("alpha.shape[1]", N.size, 1);
  args.alpha = alpha.data;
  args.delta = c.tensor("delta", delta_in, stat, {D, N}).data;
  args.theta = c.tensor("theta", theta_in, stat, {D}).data;
  args.gamma = c.tensor("gamma", gamma_in, stat, {D, N, Dim{"2", 2}}).data;
  args.omega = c.tensor("omega", omega_in, stat, {D}).data;
  args.dtype = x.dtype;
  args.x = x.data;
  args.sequences = c.sequences(x, cu_seqlens);
  args.D = D.size;
  args.N = N.size;
}

static inline CemaForward check_cema(Checker& c, const DLTensor* x_in, const DLTensor* alpha, const DLTensor* delta,
                                     const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                     const DLTensor* h0_in, const DLTensor* cu_seqlens, const char* algorithm,
                                     Outputs&& out) {
  const Tensor x = c.activation("x", x_in, {any("B"), any("L"), any("D")});
  CemaForward args{};
  check_cema_parameters(c, args, x, alpha, delta, theta, gamma, omega, cu_seqlens);
  const DType stat = stat_dtype(x.dtype);
  const Dim N{"N", args.N, "alpha", 1};
  args.h0 = c.optional("h0", h0_in, stat, {c.rows_of(x, args.sequences), x.dim(2, "D"), N, Dim{"2", 2}}).data;
  args.algorithm = check_cema_algorithm(c, algorithm, args);
  args.y = out.like(c, "y", x);
  args.h = out.next(c, "h", stat, {args.sequences.count, args.D, args.N, 2});
  args.workspace = out.workspace(c, c.on_cuda() ? args.cuda_bytes() : args.workspace_bytes());
  return args;
}

static inline CemaBackward check_cema_backward(Checker& c, const DLTensor* dy_in, const DLTensor* dh_in,
                                               const DLTensor* x_in, const DLTensor* alpha, const DLTensor* delta,
                                               const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                               const DLTensor* h0_in, const DLTensor* cu_seqlens, const char* algorithm,
                                               Outputs&& out) {
  const Tensor x = c.activation("x", x_in, {any("B"), any("L"), any("D")});
  CemaBackward args{};
  args.dy = c.like("dy", dy_in, x).data;
  check_cema_parameters(c, args, x, alpha, delta, theta, gamma, omega, cu_seqlens);
  const DType stat = stat_dtype(x.dtype);
  const Dim rows = c.rows_of(x, args.sequences), D = x.dim(2, "D"), N{"N", args.N, "alpha", 1};
  args.dh = c.optional("dh", dh_in, stat, {rows, D, N, Dim{"2", 2}}).data;
  const Tensor h0 = c.optional("h0", h0_in, stat, {rows, D, N, Dim{"2", 2}});
  args.h0 = h0.data;
  args.algorithm = check_cema_algorithm(c, algorithm, args);
  args.dx = out.like(c, "dx", x);
  args.dalpha = out.next(c, "dalpha", stat, {args.D, args.N});
  args.ddelta = out.next(c, "ddelta", stat, {args.D, args.N});
  args.dtheta = out.next(c, "dtheta", stat, {args.D});
  args.dgamma = out.next(c, "dgamma", stat, {args.D, args.N, 2});
  args.domega = out.next(c, "domega", stat, {args.D});
  args.dh0 = out.gradient(c, "dh0", h0, stat);
  if (!h0.present) args.dh0 = nullptr;
  args.workspace = out.workspace(c, c.on_cuda() ? args.cuda_bytes() : args.workspace_bytes());
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL(cema_forward, CemaForward)
MEGALODON_KERNEL(cema_backward, CemaBackward)
MEGALODON_CPU_KERNEL(cema_fft_forward, CemaForward)
MEGALODON_CPU_KERNEL(cema_fft_backward, CemaBackward)

// cema of 16-bit activations by matrix instructions. Not yet run on a GPU.
//
// Computes  y_t = sum_(s <= t) k_(t-s) x_s + Re sum_n a g_n q_n^(t+1) v_n for every tile of 32 steps, v the state (over
//           a) with which it begins, k_t = Re sum_n a g_n q_n^t, with omega in k_0; and v <- q^32 v + sum_s q^(31-s)
//           x_s. The adjoint is the same with time running back: dx_t = sum k dy + Re sum_n a q^t m, m <- q^32 m + g
//           sum q^(32-s) dy_s, m the conjugate of what cema.h calls conj(q) l. (ops/cema_mma.h, ops/cema.h)
// Layout    x, y, dy, dx [B, L, D] bf16 or f16; states [B, D, N, 2] float; parameters [D, N], [D], [D, N, 2] float;
//           carries [places, D, N, 2] double (ops/cema_cut.h); tables [channels, CemaMmaTable::bytes()]; all compact.
// Mapping   a block of 8 warps takes 8 channels, whose tables stay in shared memory, and walks through some pieces of
//           time (ops/cema_cut.h), 512 steps at once: a thread loads two steps of the 8 channels, 16 bytes each,
//           while the group before is computed, and stores them by channel as pairs of steps. A warp has a channel: 16
//           tiles are the rows of mma.m16n8k16, so that its inputs are 8 registers and k is 8 more. Sums over tiles go
//           through the warp's scratch to 4 lanes per wavelet, which chain the tiles and leave the states there as the
//           next operand. Pieces as in cema.cu: the states they end with, the carry there, then the walk.
// Traffic   2 elements moved; at N = 16, 60 products of bf16 (480 FLOP per element; f16: 82) and 250 to 300 other
//           instructions of a warp for 512 steps of a channel, most of them for the states between tiles: a quarter of
//           the scan's instructions. Limit expected: issue and shared memory, not far from that of memory. A block
//           reads 74 KB of tables (N = 16), as many bytes as 2,300 of its steps; where sequences are cut, x is read
//           once more. Rows of 16 bytes are half a sector of memory: the neighbouring block reads the other half, from
//           L2 at best.
// Numerics  coefficients and powers in double. k, the powers that lead out of a state and the state itself are the sum
//           of two bf16, each to 2^-17: the error of y before it is rounded. Powers that lead into a state are the sum
//           of three, to 2^-25, since h stays in float. Products of two low parts are left out; sums in float. bf16
//           inputs are exact; f16 inputs are exactly two bf16, since coefficients in f16 would underflow. States are
//           chained in float over 16 tiles, and from group to group in double, so that no rounding adds up. All in
//           fixed order. Zeros above k's diagonal would carry a NaN or inf back in time: see Causal; the outputs from
//           its step on are NaN, where the scan may give inf.
// Limits    16-bit activations, N <= 16, at least 512 steps (packed rows: 256 on average): CemaMmaPlan. All else is the
//           scan's, in cema.cu, and so are the gradients of parameters, and all of backward where there is h0 or dh. A
//           state times |a g| beyond 3.39e38, which bf16 rounds to inf, is inf.
#include "core/reduce.cuh"
#include "ops/cema_mma.cuh"
#include "ops/cema_mma.h"

namespace megalodon::cuda {
namespace {

constexpr double kLeastA = 1e-20;  // as in cema.cu

// ---- tables ---------------------------------------------------------------------------------------------------------

DEVICE Pair<double> as_pair(const Complex& v) { return {v.re, v.im}; }

// One wavelet's columns of the table of channel d; those that only pad it are zeros.
DEVICE void fill_wavelet(const Parameters<float>& parameters, int64_t d, int n, bool exists, bool reverse,
                         MmaTable layout, unsigned char* table) {
  Wavelet w{};
  Pair<double> g{}, q{};
  double a = 0;
  if (exists) {
    w = parameters.wavelet(d, n);
    a = w.alpha.value < kLeastA ? kLeastA : w.alpha.value;
    g = gamma_scale(parameters.N) * as_pair(parameters.gamma_of(d, n));
    q = as_pair(w.power(1));
  }
  const auto power = [&](double t) { return exists ? as_pair(w.power(t)) : Pair<double>{0, 0}; };
  Pair<double> v{exists ? 1.0 : 0.0, 0};
  for (int p = 0; p < MmaTable::kPowers; ++p) {
    auto* to = reinterpret_cast<uint32_t*>(table + p * layout.pitch()) + n;
    Pair<double> rest = v;
    UNROLL
    for (int i = 0; i < 3; ++i) {
      const uint32_t part = bf16_pair(static_cast<float>(rest.re), static_cast<float>(rest.im));
      to[i * layout.plane() / 4] = part;
      rest = rest - Pair<double>{low_of(part), high_of(part)};
    }
    v = q * v;
  }
  const Pair<double> in = reverse ? g * q : Pair<double>{1, 0};
  const Pair<double> out = reverse ? Pair<double>{a, 0} : a * g;
  const auto put = [&](int field, const Pair<double>& value) {
    reinterpret_cast<Pair<float>*>(table + layout.floats())[field * layout.wavelets() + n] = Pair<float>::of(value);
  };
  put(MmaTable::kStep, power(kMmaSteps));
  put(MmaTable::kThrough, in * out);
  put(MmaTable::kIn, in);
  for (int i = 0; i < 4; ++i) put(MmaTable::kSegment + i, out * power(i * Segment::kTiles * kMmaSteps));
  auto* wide = reinterpret_cast<Pair<double>*>(table + layout.doubles()) + n;
  wide[MmaTable::kOne * layout.wavelets()] = q;
  wide[MmaTable::kTile * layout.wavelets()] = power(kMmaSteps);
  reinterpret_cast<Pair<double>*>(table + layout.group())[n] = power(kMmaGroup);
  wide[MmaTable::kInput * layout.wavelets()] = {exists && !reverse ? a : 1, 0};
}

// A warp per channel, a lane per wavelet; then a lane per step of the response.
__global__ void __launch_bounds__(kMmaThreads) cema_mma_table_kernel(Parameters<float> parameters, const float* omega,
                                                                     int64_t D, bool reverse, unsigned char* tables) {
  const int64_t N = parameters.N, d = static_cast<int64_t>(blockIdx.x) * kMmaChannels + threadIdx.x / 32;
  const MmaTable layout = MmaTable::of(N);
  unsigned char* table = tables + d * layout.bytes();
  const int n = lane_index();
  const bool exists = d < D && n < N;
  if (n < layout.wavelets()) fill_wavelet(parameters, d, n, exists, reverse, layout, table);
  Pair<double> v{0, 0}, q{0, 0};
  if (exists) {
    const Wavelet w = parameters.wavelet(d, n);
    const double a = w.alpha.value < kLeastA ? kLeastA : w.alpha.value;
    v = (a * gamma_scale(N)) * as_pair(parameters.gamma_of(d, n));
    q = as_pair(w.power(1));
  }
  double mine = n == 0 && d < D ? omega[d] : 0;
  for (int t = 0; t < kMmaSteps; ++t) {
    const double k = warp_sum(v.re);
    if (t == n) mine += k;
    v = q * v;
  }
  auto* response = reinterpret_cast<bf16*>(table + layout.response());
  const bf16 high = narrow<bf16>(static_cast<float>(mine));
  response[n] = high;
  response[kMmaSteps + n] = narrow<bf16>(static_cast<float>(mine - widen(high)));
}

// ---- inputs and outputs ---------------------------------------------------------------------------------------------

template <class T>
struct MmaArgs {
  MmaWalk walk;
  bool packed;
  MmaTable layout;
};

// The two steps of all channels of the block that a thread moves, numbers 2 i and 2 i + 1 of a group.
template <class T>
struct TwoSteps {
  Pack<T, kMmaChannels> step[2];

  // body(which, offset of its first channel in the array) for the steps that exist.
  template <class Body>
  static DEVICE void for_steps(const MmaWalk& walk, const PieceCursor& at, Body&& body) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * static_cast<int>(threadIdx.x) + i;
      if (t >= at.steps) continue;
      body(i, (walk.reverse ? at.token - t : at.token + t) * walk.D + static_cast<int64_t>(blockIdx.x) * kMmaChannels);
    }
  }
  static DEVICE int channels(const MmaWalk& walk) {
    const int64_t left = walk.D - static_cast<int64_t>(blockIdx.x) * kMmaChannels;
    return left < kMmaChannels ? static_cast<int>(left) : kMmaChannels;
  }
  // Where the pair of channel c is.
  static DEVICE uint32_t* place(unsigned char* rows, int c) {
    const int pair = static_cast<int>(threadIdx.x);
    return reinterpret_cast<uint32_t*>(rows + c * kRowsBytes) + pair / 16 * kRowWords + pair % 16;
  }

  DEVICE void fetch(const MmaWalk& walk, const PieceCursor& at, const T* from, bool packed) {
    step[0] = step[1] = {};
    for_steps(walk, at, [&](int i, int64_t offset) {
      if (packed) {
        step[i] = load<kMmaChannels>(from + offset);
      } else {
        UNROLL
        for (int c = 0; c < kMmaChannels; ++c) {
          if (c < channels(walk)) step[i].v[c] = from[offset + c];
        }
      }
    });
  }
  DEVICE void put(unsigned char* rows) const {
    UNROLL
    for (int c = 0; c < kMmaChannels; ++c) *place(rows, c) = pair_of_halves(step[0].v[c].bits, step[1].v[c].bits);
  }
  DEVICE void take(unsigned char* rows) {
    UNROLL
    for (int c = 0; c < kMmaChannels; ++c) {
      const uint32_t pair = *place(rows, c);
      step[0].v[c] = T{static_cast<uint16_t>(pair)};
      step[1].v[c] = T{static_cast<uint16_t>(pair >> 16)};
    }
  }
  DEVICE void write(const MmaWalk& walk, const PieceCursor& at, T* to, bool packed) const {
    for_steps(walk, at, [&](int i, int64_t offset) {
      if (packed) {
        store(to + offset, step[i]);
      } else {
        UNROLL
        for (int c = 0; c < kMmaChannels; ++c) {
          if (c < channels(walk)) to[offset + c] = step[i].v[c];
        }
      }
    });
  }
};

// What is to lie in shared memory of the tables of the block's channels, one behind the other.
DEVICE void load_tables(const unsigned char* tables, MmaTable layout, unsigned char* to) {
  const int bytes = layout.shared_bytes();
  const unsigned char* from = tables + (static_cast<int64_t>(blockIdx.x) * kMmaChannels) * layout.bytes();
  for (int c = 0; c < kMmaChannels; ++c) {
    for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += kMmaThreads * 16) {
      async_copy16(to + c * bytes + i, from + static_cast<int64_t>(c) * layout.bytes() + i);
    }
  }
  async_commit();
}

// ---- the walk -------------------------------------------------------------------------------------------------------

// States of the warp's channel d of a row, where there are any: body(wavelet, its place in a tensor [rows, D, N]).
template <class Body>
DEVICE void for_wavelets(const MmaWalk& walk, int64_t d, int64_t row, Body&& body) {
  const int n = lane_index();
  if (n < walk.N) body(n, (row * walk.D + d) * walk.N + n);
}

// The states where a piece begins.
DEVICE void load_states(const MmaWalk& walk, const Channel& channel, int64_t d, const PieceCursor& at, bool ends) {
  if (lane_index() < channel.layout.wavelets()) channel.states[lane_index()] = {0, 0};
  if (ends) return;
  if (at.index > 0) {
    for_wavelets(walk, d, walk.plan.cut.place(at.sequence, at.index), [&](int n, int64_t i) {
      const auto v = load<2>(walk.carries + 2 * i);
      channel.states[n] = {v.v[0], walk.reverse ? -v.v[1] : v.v[1]};
    });
  } else if (walk.start != nullptr) {
    for_wavelets(walk, d, at.sequence, [&](int n, int64_t i) {
      const auto v = load<2>(walk.start + 2 * i);
      const double a = channel.input(n);
      channel.states[n] = {v.v[0] / a, (walk.reverse ? -v.v[1] : v.v[1]) / a};
    });
  }
}

// A group of a channel: outputs take the place of its inputs. `last`: where the sequence ends, its state [N, 2] goes
// there.
template <class T>
DEVICE void walk_group(const MmaWalk& walk, const Channel& channel, unsigned char* rows, int steps, float* last) {
  TileOperand<T> x;
  x.load(rows);
  Causal causal;
  const bool special = causal.clear(x);
  x.split();
  float y[4][4] = {};
  Toeplitz::of(channel).multiply(x, y);
  if (special) {
    x.load(rows);
    x.split();
  }
  for (int block = 0; block < channel.layout.blocks; ++block) {
    sync_warp();  // the states before have been read
    sum_tiles(channel, x, block, [](int j) { return kMmaSteps - 1 - j; });
    sync_warp();  // the sums are there
    if (last != nullptr) {
      const Segment s = Segment::of(channel, block);
      if (s.segment == 0 && s.wavelet < walk.N) {
        const Pair<double> v = channel.input(s.wavelet) * state_after<T>(channel, s, steps);
        store(last + 2 * s.wavelet,
              Pack<float, 2>{static_cast<float>(v.re), static_cast<float>(walk.reverse ? -v.im : v.im)});
      }
    }
    chain(channel, block);
    sync_warp();  // the states are there
    add_states(channel, block, walk.reverse ? 0 : 1, y);
  }
  if (special) causal.mark(y);
  sync_warp();  // the inputs have been read
  auto* to = reinterpret_cast<uint32_t*>(rows) + lane_index() / 4 * kRowWords + lane_index() % 4;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    UNROLL
    for (int r = 0; r < 2; ++r) {
      to[8 * r * kRowWords + 4 * i] = pair_of_halves(narrow<T>(y[i][2 * r]).bits, narrow<T>(y[i][2 * r + 1]).bits);
    }
  }
}

// The same without outputs.
template <class T>
DEVICE void end_group(const Channel& channel) {
  TileOperand<T> x;
  x.load(channel.rows);
  x.split();
  for (int block = 0; block < channel.layout.blocks; ++block) {
    sync_warp();  // the sums before have been read
    sum_tiles(channel, x, block, [](int j) { return kMmaSteps - 1 - j; });
    sync_warp();  // the sums are there
    chain_end(channel, block);
  }
}

template <class T, bool kEnds>
__global__ void __launch_bounds__(kMmaThreads, 2) cema_mma_kernel(MmaArgs<T> args) {
  DYNAMIC_SHARED(unsigned char, memory);
  const MmaWalk& walk = args.walk;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const MmaTable layout = args.layout;
  unsigned char* rows = memory + kMmaChannels * layout.shared_bytes();
  unsigned char* scratch = rows + kMmaChannels * kRowsBytes;
  auto* states = reinterpret_cast<Pair<double>*>(scratch + kMmaChannels * kScratchBytes);
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kMmaChannels + warp;
  const bool exists = d < walk.D;  // for a whole warp
  const Channel channel{
      memory + warp * layout.shared_bytes(), walk.table + d * layout.bytes(),  layout, rows + warp * kRowsBytes,
      scratch + warp * kScratchBytes,        states + warp * layout.wavelets()};
  const PieceWalk pieces(walk.plan.cut, kMmaGroup, walk.reverse, kEnds);
  PieceCursor at = pieces.begin();
  if (!at.exists()) return;  // the whole block
  load_tables(walk.table, layout, memory);
  TwoSteps<T> two;
  two.fetch(walk, at, static_cast<const T*>(walk.in), args.packed);
  async_wait<0>();
  sync_block();  // the tables are there

  while (at.exists()) {
    two.put(rows);
    const PieceCursor next = pieces.after(at);
    sync_block();  // the inputs are there
    if (next.exists()) two.fetch(walk, next, static_cast<const T*>(walk.in), args.packed);
    if (exists) {
      if (at.begins) {
        sync_warp();  // the states before have been read
        load_states(walk, channel, d, at, kEnds);
        sync_warp();  // the states are there
      }
      if constexpr (kEnds) {
        end_group<T>(channel);
        if (at.ends()) {
          sync_warp();  // the states have moved on
          for_wavelets(walk, d, walk.plan.cut.place(at.sequence, at.index + 1), [&](int n, int64_t i) {
            const Pair<double> v = channel.states[n];
            store(walk.carries + 2 * i, Pack<double, 2>{v.re, walk.reverse ? -v.im : v.im});
          });
        }
      } else {
        const bool is_last = walk.last != nullptr && at.is_last && at.ends();
        walk_group<T>(walk, channel, rows + warp * kRowsBytes, at.steps,
                      is_last ? walk.last + 2 * (at.sequence * walk.D + d) * walk.N : nullptr);
      }
    }
    sync_block();  // the outputs are there, the inputs have been read
    if constexpr (!kEnds) {
      TwoSteps<T> out;
      out.take(rows);
      out.write(walk, at, static_cast<T*>(walk.out), args.packed);
    }
    at = next;
  }
}

constexpr int64_t shared_bytes(MmaTable layout) {
  return kMmaChannels * (layout.shared_bytes() + kRowsBytes + kScratchBytes +
                         layout.wavelets() * static_cast<int64_t>(sizeof(Pair<double>)));
}
static_assert(shared_bytes(MmaTable::of(MmaPlan::kMostWavelets)) <= 99 * 1024);  // all that sm_86 and sm_89 have

template <class T, bool kEnds>
void launch_walk(const MmaWalk& walk, const char* name, void* stream) {
  MmaArgs<T> args{};
  args.walk = walk;
  args.packed = can_pack<T>(walk.D, walk.in, walk.out);
  args.layout = MmaTable::of(walk.N);
  const dim3 grid(static_cast<unsigned>(walk.plan.tiles), static_cast<unsigned>(walk.plan.cut.parts.parts));
  launch({name, grid, dim3(kMmaThreads), shared_bytes(args.layout), stream}, cema_mma_kernel<T, kEnds>, args);
}

template <bool kEnds>
void launch_any(const MmaWalk& walk, const char* name, void* stream) {
  if (walk.dtype == DType::kBfloat16) {
    launch_walk<bf16, kEnds>(walk, name, stream);
  } else {
    launch_walk<f16, kEnds>(walk, name, stream);
  }
}

}  // namespace

void cema_mma_table(const Parameters<float>& parameters, const float* omega, int64_t D, bool reverse,
                    unsigned char* table, void* stream) {
  const auto tiles = static_cast<unsigned>(ceil_div(D, kMmaChannels));
  launch({"cema_mma_table", dim3(tiles), dim3(kMmaThreads), 0, stream}, cema_mma_table_kernel, parameters, omega, D,
         reverse, table);
}

void cema_mma_ends(const MmaWalk& walk, void* stream) { launch_any<true>(walk, "cema_mma_ends", stream); }

void cema_mma_walk(const MmaWalk& walk, void* stream) { launch_any<false>(walk, "cema_mma_walk", stream); }

}  // namespace megalodon::cuda

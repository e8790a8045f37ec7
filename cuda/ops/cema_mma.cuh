// Pieces of cema by matrix instructions, for one warp that works on one channel and one group of 16 tiles of 32 steps:
// rows of the products are tiles, so that coefficients are the operands on the right, the same for all tiles. The
// equations are in cema_mma.cu, the table in cema_mma.h.
#pragma once

#include "core/mma.cuh"
#include "ops/cema_mma.h"
#include "ops/cema_scan.cuh"

namespace megalodon::cuda {

using MmaTable = CemaMmaTable;
using MmaPlan = CemaMmaPlan;
constexpr int kMmaTiles = static_cast<int>(MmaPlan::kTiles), kMmaSteps = static_cast<int>(MmaPlan::kTile);
constexpr int kMmaGroup = static_cast<int>(MmaPlan::kGroup), kMmaChannels = static_cast<int>(MmaPlan::kChannels);
constexpr int kMmaThreads = 32 * kMmaChannels;

// A channel's inputs in shared memory: [16 tiles][32 steps], 16 bytes longer so that 8 rows lie in different banks.
constexpr int kRowWords = kMmaSteps / 2 + 4, kRowsBytes = kMmaTiles * kRowWords * 4;
// A warp's scratch: [16 tiles][16 numbers] float, or twice as bf16; rows longer for the same reason.
constexpr int kSumPitch = 24, kStatePitch = 12;
constexpr int kScratchBytes = kMmaTiles * kSumPitch * 4;
static_assert(kScratchBytes == 2 * kMmaTiles * kStatePitch * 4);

// One channel: in shared memory, but for `cold`.
struct Channel {
  const unsigned char* table;
  const unsigned char* cold;  // the same table in global memory, all of it
  MmaTable layout;
  const unsigned char* rows;
  unsigned char* scratch;
  Pair<double>* states;  // of its wavelets, where the group begins

  DEVICE Pair<float> factor(int field, int wavelet) const {
    return reinterpret_cast<const Pair<float>*>(table + layout.floats())[field * layout.wavelets() + wavelet];
  }
  DEVICE Pair<double> group_power(int wavelet) const {
    return reinterpret_cast<const Pair<double>*>(table + layout.group())[wavelet];
  }
  DEVICE Pair<double> wide(int field, int wavelet) const {
    return reinterpret_cast<const Pair<double>*>(cold + layout.doubles())[field * layout.wavelets() + wavelet];
  }
  DEVICE double input(int wavelet) const { return wide(MmaTable::kInput, wavelet).re; }
  DEVICE float* sums() const { return reinterpret_cast<float*>(scratch); }
};

DEVICE uint32_t pair_of_halves(uint32_t low, uint32_t high) { return low | high << 16; }
DEVICE uint32_t bf16_pair(float low, float high) {
  return pair_of_halves(narrow<bf16>(low).bits, narrow<bf16>(high).bits);
}
DEVICE float low_of(uint32_t pair) { return bits_as<float>(pair << 16); }
DEVICE float high_of(uint32_t pair) { return bits_as<float>(pair & 0xffff0000u); }

// u and v as pairs of bf16: to 16 or 17 bits, high + low.
struct SplitPair {
  uint32_t high, low;

  DEVICE static SplitPair of(float u, float v) {
    SplitPair s;
    s.high = bf16_pair(u, v);
    s.low = bf16_pair(u - low_of(s.high), v - high_of(s.high));
    return s;
  }
};

// ---- operands on the left: 16 tiles, 32 steps deep ------------------------------------------------------------------

// bf16 numbers as they are; f16 numbers, of 11 bits, exactly as two bf16.
template <class T>
struct TileOperand {
  static constexpr bool kSplits = std::is_same_v<T, f16>;
  uint32_t high[2][4];
  uint32_t low[2][kSplits ? 4 : 1];

  DEVICE void load(const unsigned char* rows) {
    const int lane = lane_index();
    const unsigned char* row = rows + lane % 16 * (kRowWords * 4) + lane / 16 * 16;
    UNROLL
    for (int i = 0; i < 2; ++i) load_matrices<false>(high[i], row + i * 32);
  }
  DEVICE void split() {
    if constexpr (kSplits) {
      UNROLL
      for (int i = 0; i < 2; ++i) {
        UNROLL
        for (int r = 0; r < 4; ++r) {
          const uint32_t word = high[i][r];
          const auto s =
              SplitPair::of(widen(f16{static_cast<uint16_t>(word)}), widen(f16{static_cast<uint16_t>(word >> 16)}));
          high[i][r] = s.high, low[i][r] = s.low;
        }
      }
    }
  }
};

// c += x b, for the half of x's depth that the operand belongs to; b as the sum of kParts operands, the small ones
// first.
template <int kParts, class T>
DEVICE void add_product(float (&c)[4], const TileOperand<T>& x, int half, const uint32_t (&b)[kParts][2]) {
  if constexpr (TileOperand<T>::kSplits) {
    UNROLL
    for (int i = kParts - 2; i >= 0; --i) mma<bf16>(c[0], c[1], c[2], c[3], x.low[half], b[i][0], b[i][1]);
  }
  UNROLL
  for (int i = kParts - 1; i >= 0; --i) mma<bf16>(c[0], c[1], c[2], c[3], x.high[half], b[i][0], b[i][1]);
}

// ---- within a tile --------------------------------------------------------------------------------------------------

// The response k as a matrix that is constant along its diagonals, [depth s][column t] k_(t-s): eight rows deeper is
// eight columns to the left, so that four registers (and four for the low parts) are all of its operands.
struct Toeplitz {
  uint32_t part[2][5];  // [1 + i]: what column 8 i + lane / 4 has at depths 2 (lane % 4) and one more; [0]: zeros

  DEVICE static Toeplitz of(const Channel& channel) {
    const auto* k = reinterpret_cast<const uint16_t*>(channel.table + channel.layout.response());
    Toeplitz m;
    UNROLL
    for (int p = 0; p < 2; ++p) {
      const auto entry = [&](int j) { return static_cast<uint32_t>(j < 0 ? 0 : k[p * kMmaSteps + j]); };
      m.part[p][0] = 0;
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = 8 * i + lane_index() / 4 - 2 * (lane_index() % 4);
        m.part[p][1 + i] = pair_of_halves(entry(at), entry(at - 1));
      }
    }
    return m;
  }
  // y[i]: columns from 8 i on.
  template <class T>
  DEVICE void multiply(const TileOperand<T>& x, float (&y)[4][4]) const {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      UNROLL
      for (int i = 2 * half; i < 4; ++i) {
        const int at = i - 2 * half;
        add_product<2>(y[i], x, half, {{part[0][1 + at], part[0][at]}, {part[1][1 + at], part[1][at]}});
      }
    }
  }
};

// Zeros in the matrix above its diagonal would carry a NaN or inf back in time, to the steps of its tile before it.
// Where there are any, the product is made without them, and the outputs from the first of them on become NaN.
struct Causal {
  int first[2];  // steps of the lane's two tiles; kMmaSteps: none

  // Whether the warp's tiles have any; then they are cleared. x as loaded.
  template <class T>
  DEVICE bool clear(TileOperand<T>& x) {
    constexpr uint32_t kExponent = std::is_same_v<T, f16> ? 0x7c00u : 0x7f80u;
    const auto is_special = [](uint32_t half) { return (half & kExponent) == kExponent; };
    bool found = false;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      UNROLL
      for (int r = 0; r < 4; ++r) found = found || is_special(x.high[i][r]) || is_special(x.high[i][r] >> 16);
    }
    first[0] = first[1] = kMmaSteps;
    if (ballot(found) == 0) return false;
    UNROLL
    for (int i = 1; i >= 0; --i) {
      UNROLL
      for (int r = 3; r >= 0; --r) {  // from the last step of the lane to its first
        const int step = 16 * i + r / 2 * 8 + lane_index() % 4 * 2;
        uint32_t& word = x.high[i][r];
        if (is_special(word >> 16)) word &= 0xffffu, first[r % 2] = step + 1;
        if (is_special(word)) word &= 0xffff0000u, first[r % 2] = step;
      }
    }
    UNROLL
    for (int row = 0; row < 2; ++row) {
      UNROLL
      for (int bit = 1; bit < 4; bit *= 2) {
        const int other = shuffle_xor(first[row], bit);
        first[row] = other < first[row] ? other : first[row];
      }
    }
    return true;
  }
  DEVICE void mark(float (&y)[4][4]) const {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        if (8 * i + lane_index() % 4 * 2 + e % 2 >= first[e / 2]) y[i][e] = bits_as<float>(0x7fc00000u);
      }
    }
  }
};

// ---- from tiles to states and back ----------------------------------------------------------------------------------

// The sums over every tile sum_j q^power(j) x_j of a block of wavelets, to the scratch: [tile][re and im of each]. The
// rows of the table, in any order, are the depth of the operand on the right. All three planes: what is summed up here
// becomes states and gradients in float, which nothing rounds afterwards.
template <class T, class Power>
DEVICE void sum_tiles(const Channel& channel, const TileOperand<T>& x, int block, Power&& power) {
  const int lane = lane_index();
  float sum[2][4] = {};
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const unsigned char* row = channel.table + power(16 * half + lane / 8 % 2 * 8 + lane % 8) * channel.layout.pitch() +
                               block * 32 + lane / 16 * 16;
    uint32_t b[2][3][2];
    UNROLL
    for (int p = 0; p < 3; ++p) {
      uint32_t taken[4];
      load_matrices<true>(taken, row + p * channel.layout.plane());
      b[0][p][0] = taken[0], b[0][p][1] = taken[1], b[1][p][0] = taken[2], b[1][p][1] = taken[3];
    }
    UNROLL
    for (int i = 0; i < 2; ++i) add_product<3>(sum[i], x, half, b[i]);
  }
  const int row = lane_index() / 4, column = lane_index() % 4 * 2;
  UNROLL
  for (int i = 0; i < 2; ++i) {
    UNROLL
    for (int r = 0; r < 2; ++r) {
      store(channel.sums() + (row + 8 * r) * kSumPitch + 8 * i + column,
            Pack<float, 2>{sum[i][2 * r], sum[i][2 * r + 1]});
    }
  }
}

// What a lane has of a block of wavelets: four tiles, `segment` of the group, of one wavelet.
struct Segment {
  static constexpr int kTiles = 4;
  int segment, column, wavelet;  // column in the block, wavelet in the channel
  Pair<float> sums[kTiles];

  DEVICE static Segment of(const Channel& channel, int block) {
    Segment s;
    s.segment = lane_index() / 8;
    s.column = lane_index() % 8;
    s.wavelet = block * 8 + s.column;
    UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const auto v = load<2>(channel.sums() + (s.segment * kTiles + i) * kSumPitch + 2 * s.column);
      s.sums[i] = {v.v[0], v.v[1]};
    }
    return s;
  }
  // What a state that began the group with zero is when this segment begins and when the group ends, before kIn; kBack:
  // with time running from the last tile to the first.
  struct Prefix {
    Pair<float> before, all;
  };
  template <bool kBack>
  DEVICE Prefix prefix(Pair<float> step) const {
    Pair<float> end = sums[kBack ? kTiles - 1 : 0];
    UNROLL
    for (int i = 1; i < kTiles; ++i) end = step * end + sums[kBack ? kTiles - 1 - i : i];
    const Pair<float> squared = step * step, four = squared * squared;
    Prefix p{{0, 0}, {0, 0}};
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int from = kBack ? 3 - i : i;
      if (segment == from) p.before = p.all;
      const Pair<float> other{shuffle(end.re, from * 8 + column), shuffle(end.im, from * 8 + column)};
      p.all = i == 0 ? other : four * p.all + other;
    }
    return p;
  }
};

// The states of a block of wavelets with which every tile of a group begins, times kOut, to the scratch as an operand
// on the left, [tile][re, -im of each] high and low; the state moves on to the end of the group.
DEVICE void chain(const Channel& channel, int block) {
  const Segment s = Segment::of(channel, block);
  const auto factor = [&](int field) { return channel.factor(field, s.wavelet); };
  const Pair<float> step = factor(MmaTable::kStep);
  const auto p = s.prefix<false>(step);
  const Pair<double> state = channel.states[s.wavelet];
  Pair<float> u =
      factor(MmaTable::kSegment + s.segment) * Pair<float>::of(state) + factor(MmaTable::kThrough) * p.before;
  sync_warp();  // all sums and states have been read
  if (s.segment == 0) {
    channel.states[s.wavelet] =
        channel.group_power(s.wavelet) * state + Pair<double>::of(factor(MmaTable::kIn)) * Pair<double>::of(p.all);
  }
  auto* to = reinterpret_cast<uint32_t*>(channel.scratch);
  UNROLL
  for (int i = 0; i < Segment::kTiles; ++i) {
    const auto split = SplitPair::of(u.re, -u.im);
    const int at = (s.segment * Segment::kTiles + i) * kStatePitch + s.column;
    to[at] = split.high;
    to[kMmaTiles * kStatePitch + at] = split.low;
    u = step * u + factor(MmaTable::kThrough) * s.sums[i];
  }
}

// The same without the states in between.
DEVICE void chain_end(const Channel& channel, int block) {
  const Segment s = Segment::of(channel, block);
  const auto p = s.prefix<false>(channel.factor(MmaTable::kStep, s.wavelet));
  if (s.segment != 0) return;
  Pair<double>& state = channel.states[s.wavelet];
  state = channel.group_power(s.wavelet) * state +
          Pair<double>::of(channel.factor(MmaTable::kIn, s.wavelet)) * Pair<double>::of(p.all);
}

// The state after `steps` steps of a group, from its tiles' sums and, of the last tile, step by step.
template <class T>
DEVICE Pair<double> state_after(const Channel& channel, const Segment& s, int steps) {
  const int tiles = steps / kMmaSteps;
  const Pair<double> in = Pair<double>::of(channel.factor(MmaTable::kIn, s.wavelet));
  const Pair<double> tile = channel.wide(MmaTable::kTile, s.wavelet), one = channel.wide(MmaTable::kOne, s.wavelet);
  Pair<double> state = channel.states[s.wavelet];
  for (int i = 0; i < tiles; ++i) {
    const auto v = load<2>(channel.sums() + i * kSumPitch + 2 * s.column);
    state = tile * state + in * Pair<double>{v.v[0], v.v[1]};
  }
  const auto* row = reinterpret_cast<const T*>(channel.rows) + tiles * (2 * kRowWords);
  for (int t = 0; t < steps % kMmaSteps; ++t) state = one * state + static_cast<double>(widen(row[t])) * in;
  return state;
}

// y[i] += the states of the scratch times q^(first + t), t = 8 i and seven more.
DEVICE void add_states(const Channel& channel, int block, int first, float (&y)[4][4]) {
  const int lane = lane_index();
  uint32_t high[4], low[4];
  const unsigned char* row = channel.scratch + lane % 16 * (kStatePitch * 4) + lane / 16 * 16;
  load_matrices<false>(high, row);
  load_matrices<false>(low, row + kMmaTiles * kStatePitch * 4);
  const unsigned char* column =
      channel.table + (first + lane / 16 * 8 + lane % 8) * channel.layout.pitch() + block * 32 + lane / 8 % 2 * 16;
  UNROLL
  for (int i = 0; i < 4; i += 2) {
    const unsigned char* at = column + 8 * i * channel.layout.pitch();
    uint32_t power[4], rest[4];  // of columns from 8 i on, then from 8 (i + 1) on
    load_matrices<false>(power, at);
    load_matrices<false>(rest, at + channel.layout.plane());
    UNROLL
    for (int j = 0; j < 2; ++j) {
      float (&c)[4] = y[i + j];
      mma<bf16>(c[0], c[1], c[2], c[3], high, power[2 * j], power[2 * j + 1]);
      mma<bf16>(c[0], c[1], c[2], c[3], high, rest[2 * j], rest[2 * j + 1]);
      mma<bf16>(c[0], c[1], c[2], c[3], low, power[2 * j], power[2 * j + 1]);
    }
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// A walk over time, forward or, for the adjoint, backward.
struct MmaWalk {
  DType dtype;
  bool reverse;
  const void* in;              // [B, L, D]
  void* out;                   // [B, L, D]
  const unsigned char* table;  // [channels] CemaMmaTable, for this direction
  const float* start;          // [B, D, N, 2]: the state at the very beginning, or nullptr
  float* last;                 // [B, D, N, 2]: at the very end, or nullptr
  double* carries;             // [places of the cut, D, N, 2]: the states where the pieces but the first begin
  int64_t D, N;
  MmaPlan plan;
};

void cema_mma_table(const Parameters<float>& parameters, const float* omega, int64_t D, bool reverse,
                    unsigned char* table, void* stream);
void cema_mma_ends(const MmaWalk& walk, void* stream);  // the states pieces end with, begun with zeros, to carries
void cema_mma_walk(const MmaWalk& walk, void* stream);

}  // namespace megalodon::cuda

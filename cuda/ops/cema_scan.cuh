// The scan of CEMA over time: one frame for the three recurrences of cema_waves.cuh.
//
// A block of threads walks through pieces of time of a tile of channels. The inputs come through a ring of tiles in
// shared memory, and outputs go back through the same tile. A channel belongs to kLanes lanes of one warp, kEach
// wavelets in the registers of each; the sums over lanes of kStep steps are made together, each lane keeping its own.
#pragma once

#include "core/pack.cuh"
#include "ops/cema_pieces.cuh"
#include "ops/cema_waves.cuh"

namespace megalodon::cuda {

constexpr int kStages = 4;  // tiles of the ring

template <class T, int kLanes>
struct Tiles {
  static constexpr int kChannels = kThreads / kLanes;
  static constexpr int kPack = kPackOf<T>;
  static constexpr int kFit = 8192 / (kChannels * static_cast<int>(sizeof(T)));
  static constexpr int kRows = kFit < 32 ? kFit : 32;  // steps
  static constexpr int kStep = kLanes < 4 ? 4 : kLanes;
  // Rows are longer by what lets the lanes of a channel, each in its row, meet different banks.
  static constexpr int kPad = kLanes == 1 ? 0 : (32 / kLanes + kPack - 1) / kPack * kPack;
  static constexpr int kPitch = kChannels + kPad;
  static constexpr int kSize = kRows * kPitch;
  static_assert(kRows % kStep == 0 && 64 % kRows == 0);
  static constexpr int64_t bytes(int inputs) { return int64_t{kStages} * inputs * kSize * sizeof(T); }
};

// Rows of one array [B, L, D], from or to a tile; channels beyond D read as zeros. body(element of the tile, of the
// array, whether it exists), 16 bytes at a time or one element.
template <class T, int kLanes, bool kReverse, class Body>
DEVICE void for_elements(const ScanArgs<T>& args, const PieceCursor& at, int width, Body&& body) {
  using Tile = Tiles<T, kLanes>;
  const int64_t d0 = static_cast<int64_t>(blockIdx.x) * Tile::kChannels;
  const int64_t base = at.token * args.D + d0;
  const int64_t stride = kReverse ? -args.D : args.D;
  const int wide = Tile::kChannels / width;
  for (int i = threadIdx.x; i < at.steps * wide; i += kThreads) {
    const int row = i / wide, column = i % wide * width;
    body(row * Tile::kPitch + column, base + row * stride + column, d0 + column < args.D);
  }
}

template <class T, int kLanes, bool kReverse>
DEVICE void load_tile(const ScanArgs<T>& args, const PieceCursor& at, const T* from, T* tile) {
  if (args.packed) {
    for_elements<T, kLanes, kReverse>(args, at, kPackOf<T>, [&](int to, int64_t i, bool exists) {
      async_copy16(tile + to, exists ? from + i : from, exists);
    });
  } else {
    for_elements<T, kLanes, kReverse>(args, at, 1,
                                      [&](int to, int64_t i, bool exists) { tile[to] = exists ? from[i] : T{}; });
  }
}

template <class T, int kLanes, bool kReverse>
DEVICE void store_tile(const ScanArgs<T>& args, const PieceCursor& at, const T* tile, T* to) {
  if (args.packed) {
    for_elements<T, kLanes, kReverse>(args, at, kPackOf<T>, [&](int from, int64_t i, bool exists) {
      if (exists) store(to + i, load<kPackOf<T>>(tile + from));
    });
  } else {
    for_elements<T, kLanes, kReverse>(args, at, 1, [&](int from, int64_t i, bool exists) {
      if (exists) to[i] = tile[from];
    });
  }
}

// The sums over kLanes lanes, `apart` from each other, of v[0 .. kStep-1]: lane i keeps kStep / kLanes of them, from
// v[i kStep / kLanes] on, in v[0] and what follows.
template <int kLanes, int kStep, class A>
DEVICE void sum_over_lanes(A (&v)[kStep], int lane, int apart) {
  UNROLL
  for (int bit = kLanes / 2; bit > 0; bit /= 2) {
    const int half = bit * (kStep / kLanes);
    const bool upper = (lane & bit) != 0;
    UNROLL
    for (int i = 0; i < kStep / 2; ++i) {
      if (i >= half) break;
      const A sent = upper ? v[i] : v[i + half];
      const A kept = upper ? v[i + half] : v[i];
      v[i] = kept + shuffle_xor(sent, bit * apart);
    }
  }
}

// The pieces of one part. kEnds: only the state a piece ends with, having begun with zeros, goes to where the next one
// of its sequence begins.
template <class T, int kLanes, class Waves, bool kEnds>
DEVICE void scan(const ScanArgs<T>& args, T* ring) {
  using A = stat_t<T>;
  using Tile = Tiles<T, kLanes>;
  constexpr bool kReverse = Waves::kReverse, kOther = Waves::kOther && !kEnds, kOutput = Waves::kOutput && !kEnds;
  constexpr int kApart = 32 / kLanes;  // channels of a warp
  constexpr int kRows = Tile::kRows, kStep = kOutput ? Tile::kStep : 4, kOwn = kStep / kLanes;
  const int lane = lane_index() / kApart;  // of the channel
  const int column = static_cast<int>(threadIdx.x) / 32 * kApart + lane_index() % kApart;
  const Mine mine{static_cast<int64_t>(blockIdx.x) * Tile::kChannels + column, lane, kLanes};
  const bool exists = mine.d < args.D;
  const A omega = kOutput && exists ? args.omega[mine.d] : A(0);
  const bool is_last_group = args.first + int64_t{kEach} * kLanes >= args.N;
  const int64_t carried = 2 * Waves::kStates;  // doubles per wavelet

  const PieceWalk walk(args.cut, kRows, kReverse, kEnds && !args.keeps_ends);
  PieceCursor at = walk.begin(), ahead = at;
  if (kEnds && !at.exists()) return;  // the whole block

  Waves waves;
  waves.load(args, mine);

  const auto fill = [&](int stage) {
    T* tile = ring + stage * (Waves::kOther ? 2 : 1) * Tile::kSize;
    if (ahead.exists()) {
      load_tile<T, kLanes, kReverse>(args, ahead, args.in, tile);
      if constexpr (kOther) load_tile<T, kLanes, kReverse>(args, ahead, args.other, tile + Tile::kSize);
      ahead = walk.after(ahead);
    }
    async_commit();
  };
  UNROLL
  for (int i = 0; i < kStages - 1; ++i) fill(i);

  int done = 0;  // steps of a block between corrections
  for (int stage = 0; at.exists(); stage = (stage + 1) % kStages) {
    async_wait<kStages - 2>();
    sync_block();  // the tile is there, and the one to be filled next has been stored
    fill((stage + kStages - 1) % kStages);
    T* tile = ring + stage * (Waves::kOther ? 2 : 1) * Tile::kSize;
    const T* other = kOther ? tile + Tile::kSize : nullptr;
    const int rows = at.steps;

    if (at.begins) {
      UNROLL
      for (int k = 0; k < kEach; ++k) {
        Pair<double> from[Waves::kStates] = {};
        if (!kEnds && at.index == 0) from[0] = waves.start(args, mine, at.sequence, k);
        if (!kEnds && at.index > 0 && mine.has(args, k)) {
          const double* place =
              args.carries + (args.cut.place(at.sequence, at.index) * args.D * args.N + mine.index(args, k)) * carried;
          UNROLL
          for (int i = 0; i < Waves::kStates; ++i) from[i] = {place[2 * i], place[2 * i + 1]};
        }
        UNROLL
        for (int i = 0; i < Waves::kStates; ++i) waves.state(k, i) = State<A>::of(from[i]);
      }
    }
    if (done == 0 && rows > 0) waves.begin(at.left < Waves::kBlock ? at.left : Waves::kBlock);

    const auto input = [&](int t) { return widen(tile[t * Tile::kPitch + column]); };
    const auto advance = [&](int t) {
      return waves.template step<kEnds>(input(t), kOther ? widen(other[t * Tile::kPitch + column]) : A(0));
    };
    const auto write = [&](int t, A sum) {
      sum += args.first == 0 ? omega * input(t) : A(0);
      if (args.partial != nullptr && exists) {
        A& so_far = args.partial[(kReverse ? at.token - t : at.token + t) * args.D + mine.d];
        if (args.first > 0) sum += so_far;
        so_far = sum;
      }
      tile[t * Tile::kPitch + column] = narrow<T>(sum);
    };
    int t0 = 0;
    for (; t0 + kStep <= rows; t0 += kStep) {
      A v[kStep];
      UNROLL
      for (int j = 0; j < kStep; ++j) {
        if (kStep > 8 && j % 8 == 0) sync_warp();  // the registers do not suffice for reading all steps ahead
        v[j] = advance(t0 + j);
      }
      if constexpr (kOutput) {
        sum_over_lanes<kLanes, kStep>(v, lane, kApart);
        if constexpr (kLanes > 1) sync_warp();  // all lanes have read what is overwritten
        UNROLL
        for (int j = 0; j < kOwn; ++j) write(t0 + lane * kOwn + j, v[j]);
      }
    }
    for (; t0 < rows; ++t0) {  // the end of the piece
      A v = advance(t0);
      if constexpr (kOutput) {
        UNROLL
        for (int bit = kLanes / 2; bit > 0; bit /= 2) v += shuffle_xor(v, bit * kApart);
        if constexpr (kLanes > 1) sync_warp();
        if (lane == 0) write(t0, v);
      }
    }

    done += rows;
    if (at.ends() || done == Waves::kBlock) {
      waves.settle();
      done = 0;
    }
    if (at.ends()) {
      if constexpr (kEnds) {
        const int64_t place =
            args.keeps_ends ? args.cut.end(at.sequence, at.index) : args.cut.place(at.sequence, at.index + 1);
        UNROLL
        for (int k = 0; k < kEach; ++k) {
          if (!mine.has(args, k)) continue;
          double* to = args.carries + (place * args.D * args.N + mine.index(args, k)) * carried;
          UNROLL
          for (int i = 0; i < Waves::kStates; ++i) {
            const Pair<double> state = waves.state(k, i).exact();
            to[2 * i] = state.re;
            to[2 * i + 1] = state.im;
          }
        }
      } else if (at.is_last) {
        waves.finish_sequence(args, mine, at.sequence);
      }
    }
    if constexpr (kOutput) {
      if (is_last_group) {
        sync_block();  // the outputs of all channels are in the tile
        store_tile<T, kLanes, kReverse>(args, at, tile, args.out);
      }
    }
    at = walk.after(at);
  }
  if constexpr (!kEnds) waves.finish(args, mine, args.sums + blockIdx.y * args.block_sums);
}

// Blocks of a processor: what the registers suffice for.
template <class T>
constexpr int kForwardBlocks = sizeof(T) == 8 ? 3 : 4;

template <class T, int kLanes, bool kEnds>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T>) cema_forward_kernel(ScanArgs<T> args) {
  DYNAMIC_SHARED(T, ring);
  scan<T, kLanes, Forward<T>, kEnds>(args, ring);
}

}  // namespace megalodon::cuda

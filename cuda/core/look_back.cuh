// Recurrences in one pass over memory: a block works on a tile of a chain, computes what the tile does to the
// recurrence's state (its aggregate) from its own data, and gets the state before it from the tiles before it, which
// run at the same time.
//
// A window is 32 tiles. A tile publishes its aggregate; the last one of a window also publishes the state after the
// window. The state before a tile is the state after the last whole window, then the aggregates in between, which the
// lanes of a warp fold. So a state has come through one merge per window and one fold, the same ones in every run:
// results repeat. Tiles are taken by ticket, hence no tile waits for one that has not been started.
//
// A chain may be several recurrences one after another, each beginning with some tile. Every tile publishes, even one
// that belongs to none: a tile that is wrong about where its recurrence begins gets a wrong state, but waits for none
// that never comes.
#pragma once

#include "core/portable.cuh"
#include "core/scan.cuh"

namespace megalodon::cuda {

constexpr int kWindow = 32;

struct alignas(32) Slot {
  double value[3];
  uint64_t is_published;  // starts as 0
};

template <class S>
DEVICE void publish(Slot* slot, const S& value) {
  static_assert(sizeof(S) <= sizeof slot->value);
  *reinterpret_cast<S*>(slot->value) = value;
  store_release(&slot->is_published, 1);
}

template <class S>
DEVICE S await(const Slot* slot) {
  while (load_acquire(&slot->is_published) == 0) {
  }
  return *reinterpret_cast<const S*>(slot->value);
}

// The state before `tile` of the chain of these slots (one per tile, then one per whole window): a warp's work.
// S{} is the aggregate that changes nothing, fold(lane's aggregate) those of all lanes in order, apply(state,
// aggregate) the state after; start() the state before tile `first`, with which the recurrence begins.
template <class S, class Start, class Fold, class Apply>
DEVICE auto look_back(Slot* tiles, int tile_count, int first, int tile, const S& aggregate, Start&& start, Fold&& fold,
                      Apply&& apply) {
  using State = decltype(start());
  const int lane = lane_index();
  const int window = tile / kWindow;
  const int place = tile % kWindow;
  Slot* windows = tiles + tile_count;
  if (lane == 0) publish(tiles + tile, aggregate);
  const int begin = window * kWindow;
  const S between = fold(lane < place && begin + lane >= first ? await<S>(tiles + begin + lane) : S{});
  const State before = apply(first < begin ? await<State>(windows + window - 1) : start(), between);
  if (lane == 0 && place == kWindow - 1) publish(windows + window, apply(before, aggregate));
  return before;
}

// For a tile of no recurrence: a thread's work.
DEVICE void publish_none(Slot* tiles, int tile_count, int tile) {
  store_release(&tiles[tile].is_published, 1);
  if (tile % kWindow == kWindow - 1) store_release(&tiles[tile_count + tile / kWindow].is_published, 1);
}

// make(ticket) of the next ticket of all blocks, in shared memory; without a counter the ticket is the block's index.
template <class Make>
DEVICE const auto& take_ticket(uint32_t* next, Make&& make) {
  using Made = decltype(make(uint32_t{}));
  SHARED(Made, made);
  if (threadIdx.x == 0) made = make(next == nullptr ? static_cast<uint32_t>(blockIdx.x) : atomic_add(next, 1));
  sync_block();  // it has been taken
  return made;
}

// Tickets and slots before they are used.
template <class Word>
__global__ void __launch_bounds__(256) clear_kernel(Word* words, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) words[i] = 0;
}

inline void clear(void* memory, int64_t bytes, void* stream) {
  const int64_t count = (bytes + 7) / 8;
  launch({"clear", dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), 0, stream}, clear_kernel<uint64_t>,
         static_cast<uint64_t*>(memory), count);
}

}  // namespace megalodon::cuda

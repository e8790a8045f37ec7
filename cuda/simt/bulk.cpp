// Barriers in shared memory (mbarrier), the tensor copies that arrive at them, and clusters of blocks.
//
// A copy takes effect as late as it may: when somebody waits for the barrier and nothing else is missing. Until then
// its destination holds NaN bytes. What a barrier is, is kept here; its own eight bytes stay as they are.
#include <cstring>

#include "simt/executor.h"

namespace megalodon::simt {
namespace {

constexpr int kLineBytes = 128;  // of the swizzle's pattern, and of a box's first dimension

Block& own_block() { return *executor.current->block; }

// The running block of this thread's cluster with that rank.
Block& block_of_rank(uint32_t rank) {
  Block& own = own_block();
  if (rank == own.rank) return own;
  if (rank >= executor.launch->cluster) fail("rank %u of a cluster of %u", rank, executor.launch->cluster);
  const uint32_t number = own.number - own.rank + rank;
  for (const auto& block : executor.slots) {
    if (block->active && block->number == number) return *block;
  }
  fail("shared memory of block %u of the cluster, which %s", rank,
       executor.is_done[number] ? "has exited" : "may not have begun");
}

Mbarrier& barrier_of(const uint64_t* address, uint32_t rank) {
  Block &own = own_block(), &owner = block_of_rank(rank);
  const auto* pointer = reinterpret_cast<const char*>(address);
  if (pointer < own.arena || pointer >= own.arena + kArenaBytes) fail("a barrier is not in this block's shared memory");
  const auto found = owner.mbarriers.find(pointer - own.arena);
  if (found == owner.mbarriers.end()) fail("a barrier is used that nobody has initialised");
  Mbarrier& barrier = found->second;
  const bool seen = barrier.thread == executor.current || (&owner == &own && barrier.syncs != own.syncs) ||
                    barrier.cluster_syncs != own.cluster_syncs;
  if (!seen || !barrier.fenced) {
    fail("a barrier is used before its initialisation is visible (fence_barrier_init, then %s)",
         &owner == &own ? "sync_block" : "sync_cluster");
  }
  return barrier;
}

void complete_if_done(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.count;
  barrier.published = std::move(barrier.arriving);
  barrier.arriving.clear();
  executor.idle_spins = 0;
}

void arrive(Mbarrier& barrier, int count) {
  if (barrier.missing == 0) fail("an arrival at a barrier whose phase has all, and for whose end nobody has waited");
  if (count < 1 || count > barrier.missing) {
    fail("%d arrivals at a barrier that lacks %d of %d", count, barrier.missing, barrier.count);
  }
  barrier.missing -= count;
  executor.idle_spins = 0;
  race_publish(barrier.arriving);
  complete_if_done(barrier);
}

// A line of a box: which of its bytes are in the tensor, and where they come from.
struct Line {
  int begin, end;
  const char* from;
};

Line line_of(const TensorCopy& copy, int y, int z) {
  const TensorMap& map = copy.map;
  const int64_t x = copy.at[0], at[2] = {int64_t{copy.at[1]} + y, int64_t{copy.at[2]} + z};
  const int64_t begin = x < 0 ? -x : 0, end = map.sizes[0] - x < map.box[0] ? map.sizes[0] - x : map.box[0];
  for (int i = 0; i < 2; ++i) {
    if (at[i] < 0 || at[i] >= map.sizes[i + 1]) return {};
  }
  if (begin >= end) return {};
  return {static_cast<int>(begin) * 2, static_cast<int>(end) * 2,
          static_cast<const char*>(map.base) + (x + begin) * 2 + at[0] * map.strides[0] + at[1] * map.strides[1]};
}

// visit(number, line)
template <class Visit>
void for_lines(const TensorCopy& copy, Visit&& visit) {
  int number = 0;
  for (int z = 0; z < copy.map.box[2]; ++z) {
    for (int y = 0; y < copy.map.box[1]; ++y) visit(number++, line_of(copy, y, z));
  }
}

void complete(const TensorCopy& copy) {
  for_lines(copy, [&](int number, const Line& line) {
    char whole[kLineBytes] = {};
    if (line.begin < line.end) std::memcpy(whole + line.begin, line.from, line.end - line.begin);
    for (int pack = 0; pack < kLineBytes / 16; ++pack) {  // the destination is aligned to a pattern of 8 lines
      std::memcpy(copy.shared + number * kLineBytes + (pack ^ number % 8) * 16, whole + pack * 16, 16);
    }
  });
}

// Whether the phase with that parity has ended. What the barrier waits for in copies alone, happens now.
bool is_over(Mbarrier& barrier, int parity) {
  if (barrier.phase % 2 != static_cast<uint32_t>(parity)) return true;
  if (barrier.missing > 0) return false;
  for (const TensorCopy& copy : barrier.copies) {
    complete(copy);
    barrier.bytes -= copy.bytes;
    executor.idle_spins = 0;
  }
  barrier.copies.clear();
  if (barrier.bytes < 0) fail("more bytes have come to a barrier than were expected");
  complete_if_done(barrier);
  return barrier.phase % 2 != static_cast<uint32_t>(parity);
}

bool all_have_arrived(const Block& block, uint32_t phase) {
  for (const Thread& thread : block.threads) {
    if (thread.state != State::kDone && thread.cluster_arrivals < phase) return false;
  }
  return true;
}

bool cluster_has_arrived(uint32_t phase) {
  const Block& own = own_block();
  for (uint32_t rank = 0; rank < executor.launch->cluster; ++rank) {
    const uint32_t number = own.number - own.rank + rank;
    if (executor.is_done[number]) continue;
    bool arrived = false;
    for (const auto& block : executor.slots) {
      arrived |= block->active && block->number == number && all_have_arrived(*block, phase);
    }
    if (!arrived) return false;
  }
  return true;
}

}  // namespace

bool has_tensor_copies_in_flight(const Block& block) {
  for (const auto& [place, barrier] : block.mbarriers) {
    if (!barrier.copies.empty()) return true;
  }
  return false;
}

TensorMap tensor_map(const void* base, const int64_t (&sizes)[3], const int64_t (&strides)[2], int lines) {
  bool right = reinterpret_cast<uintptr_t>(base) % 16 == 0 && lines >= 1 && lines <= 256;
  for (const int64_t size : sizes) right &= size >= 1 && size <= int64_t{1} << 32;
  for (const int64_t stride : strides) right &= stride >= 1 && stride * 2 % 16 == 0 && stride * 2 < int64_t{1} << 40;
  if (!right) fail("a tensor map of the wrong alignment, sizes, strides or box");
  return {base, {sizes[0], sizes[1], sizes[2]}, {strides[0] * 2, strides[1] * 2}, {kLineBytes / 2, 1, lines}};
}

void mbarrier_init(uint64_t* address, int count) {
  Block& block = own_block();
  const auto* pointer = reinterpret_cast<const char*>(address);
  if (pointer < block.arena || pointer >= block.arena + kArenaBytes) fail("a barrier is not in shared memory");
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0 || count < 1) fail("a barrier's address or count is wrong");
  Mbarrier barrier{};
  barrier.count = barrier.missing = count;
  barrier.thread = executor.current;
  barrier.syncs = block.syncs;
  barrier.cluster_syncs = block.cluster_syncs;
  if (!block.mbarriers.emplace(pointer - block.arena, std::move(barrier)).second) {
    fail("a barrier is initialised for the second time");
  }
}

void fence_barrier_init() {
  for (auto& [place, barrier] : own_block().mbarriers) barrier.fenced |= barrier.thread == executor.current;
}

void mbarrier_arrive(uint64_t* address, int count, uint32_t rank) {
  arrive(barrier_of(address, rank), count);
  maybe_yield();
}

void mbarrier_expect(uint64_t* address, int bytes) {
  Mbarrier& barrier = barrier_of(address, own_block().rank);
  barrier.bytes += bytes;
  arrive(barrier, 1);
  maybe_yield();
}

void mbarrier_wait(uint64_t* address, int parity) {
  Mbarrier& barrier = barrier_of(address, own_block().rank);
  while (!is_over(barrier, parity)) spin();
  race_acquire(barrier.published);
}

uint32_t cluster_rank() { return own_block().rank; }

void tensor_copy(void* shared, const TensorMap& map, const int (&at)[3], uint64_t* address, uint32_t ranks) {
  Block& own = own_block();
  auto* to = static_cast<char*>(shared);
  const int bytes = map.box[0] * map.box[1] * map.box[2] * 2;
  if (to < own.arena || to + bytes > own.arena + kArenaBytes) {
    fail("the destination of a tensor copy is not in shared memory");
  }
  if (reinterpret_cast<uintptr_t>(to) % (8 * kLineBytes) != 0) {
    fail("the destination of a tensor copy is not aligned to a pattern of 1024 bytes");
  }
  if (ranks == 0 || ranks >> executor.launch->cluster != 0) fail("a tensor copy to blocks %#x of a cluster", ranks);
  TensorCopy copy{map, {at[0], at[1], at[2]}, nullptr, bytes};
  for_lines(copy, [](int, const Line& line) {
    if (line.begin < line.end) race_read(line.from, line.end - line.begin);
  });
  for (uint32_t rank = 0; rank < executor.launch->cluster; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    Mbarrier& barrier = barrier_of(address, rank);
    Block& owner = block_of_rank(rank);
    copy.shared = owner.arena + (to - own.arena);
    race_write_bulk(owner, copy.shared, bytes, barrier.arriving);
    std::memset(copy.shared, kNanByte, bytes);
    barrier.copies.push_back(copy);
  }
  executor.idle_spins = 0;
  maybe_yield();
}

void cluster_arrive() {
  Thread& thread = *executor.current;
  ++thread.cluster_arrivals;
  race_publish(executor.of_clusters[thread.block->number - thread.block->rank]);
  executor.idle_spins = 0;
  maybe_yield();
}

void cluster_wait() {
  Thread& thread = *executor.current;
  while (!cluster_has_arrived(thread.cluster_arrivals)) spin();
  if (thread.block->cluster_syncs < thread.cluster_arrivals) thread.block->cluster_syncs = thread.cluster_arrivals;
  race_acquire(executor.of_clusters[thread.block->number - thread.block->rank]);
}

}  // namespace megalodon::simt

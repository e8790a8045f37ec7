// What the parts of the executor share. Nothing here is seen by kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt/fiber.h"
#include "simt/simt.h"

namespace megalodon::simt {

constexpr uint32_t kResidentBlocks = 4;         // in flight at a time, so that blocks can wait for each other
constexpr uint32_t kMaxThreads = 1024;          // per block
constexpr size_t kMaxSharedBytes = 227 * 1024;  // per block, of an H100
constexpr size_t kArenaBytes = 256 * 1024;      // with room for the red zones
constexpr size_t kRedZoneBytes = 64;
constexpr int kNanByte = 0xff;                   // 0xff... is NaN in every floating-point type and -1 in every integer
constexpr uint64_t kMaxIdleSpins = 1000 * 1000;  // spins without any progress: a livelock

// What is known to have happened before: accesses of a block, warp or thread (the key) with a smaller number than the
// value. See race.cpp.
using Knowledge = std::unordered_map<uint64_t, uint32_t>;

struct AsyncCopy {
  char* shared;
  const char* global;
  int bytes;
  int source_bytes;
};

struct IssuedWgmma {
  Wgmma instruction;
  float* sums;  // of lane 0
  const uint32_t* registers_of_a[32];
};

// Registers that products in flight are added to.
struct WarpSums {
  float* registers[32];
  std::vector<float> values;  // of all lanes, one after another
  int in_flight;
};

struct Block;
struct Thread;
struct Warp;

// A tensor copy on its way into the shared memory of one block.
struct TensorCopy {
  TensorMap map;
  int at[3];
  char* shared;
  int bytes;
};

// A barrier in a block's shared memory. See bulk.cpp.
struct Mbarrier {
  int count, missing;  // arrivals that end a phase, and those of them still to come
  uint32_t phase;      // how many have ended
  int64_t bytes;       // expected in this one, less those that have come
  std::vector<TensorCopy> copies;
  Knowledge arriving, published;  // of those who have arrived in this phase; in the last one
  // Who initialised it, and the barriers its block had passed then.
  const Thread* thread;
  uint32_t syncs, cluster_syncs;
  bool fenced;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtWarpOp, kDone };

struct Thread {
  Fiber fiber;
  uint3 index;
  uint32_t linear;
  uint32_t lane;
  Block* block;
  Warp* warp;
  State state;
  bool spun;  // gave up its turn in a spin loop
  Site site;  // of the barrier or warp operation it waits at
  // The warp operation.
  uint32_t mask;
  WarpOp op;
  void* operand;
  Combine combine;
  // Asynchronous copies, oldest group first; the last group is not committed yet.
  std::vector<std::vector<AsyncCopy>> copies;
  // Race detector.
  uint32_t clock;
  uint16_t proxy_fences;
  Knowledge known, pending, released;
  uint32_t cluster_arrivals;
};

struct Warp {
  uint32_t index;
  uint32_t live;     // lanes that have not exited
  uint32_t waiting;  // lanes at a warp operation
  Thread* lanes[32];
  uint32_t epoch;
  Knowledge known;
  // Matrix instructions of the warpgroup: groups in flight, oldest first, the last not committed yet; their sums; how
  // many have been issued.
  std::vector<std::vector<IssuedWgmma>> groups;
  std::vector<WarpSums> sums;
  size_t wgmmas;
  bool fenced;  // wgmma_fence, since sums were last handed back
};

struct Block {
  uint3 index;
  uint32_t number;  // unique within the launch
  bool active = false;
  uint32_t live;     // threads that have not exited
  uint32_t waiting;  // threads at the barrier
  Site barrier;      // where they wait
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  char* arena = nullptr;  // shared memory
  size_t arena_used;
  size_t static_bytes;  // of variables
  char* dynamic_shared;
  std::vector<std::pair<const void*, char*>> variables;
  uint32_t epoch;  // barriers passed
  Knowledge known;
  std::unordered_map<uint32_t, std::vector<Wgmma>> wgmmas;  // all that its warpgroups have issued
  // In its cluster, if there are any.
  uint32_t rank;
  uint32_t syncs, cluster_syncs;                           // barriers of the block, of the cluster, that it has passed
  uint32_t bulk_writes;                                    // into its shared memory
  std::unordered_map<std::ptrdiff_t, Mbarrier> mbarriers;  // by their places
};

enum class Order { kForward, kReverse, kRandom, kLockstep };

struct Executor {
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  Thread* current = nullptr;
  std::vector<std::unique_ptr<Block>> slots;
  char* stacks = nullptr;  // of all threads of all slots
  size_t stack_bytes = 0;
  char* arenas = nullptr;  // shared memory of all slots
  Order order = Order::kForward;
  uint64_t random_state = 1;
  uint64_t idle_spins = 0;
  std::vector<bool> is_done;                            // by blocks' numbers
  std::unordered_map<uint32_t, Knowledge> of_clusters;  // published at their barriers, by their first block's number
  std::string error;

  uint32_t random() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 32);
  }
  bool on_stacks(const void* address) const {
    const auto* p = static_cast<const char*>(address);
    return p >= stacks && p < stacks + kResidentBlocks * kMaxThreads * stack_bytes;
  }
  bool in_arenas(const void* address) const {
    const auto* p = static_cast<const char*>(address);
    return p >= arenas && p < arenas + kResidentBlocks * kArenaBytes;
  }
};
extern Executor executor;

// Gives up the processor until the scheduler comes back.
void yield();
std::string describe(const Thread& thread);

// The schedule (schedule.cpp): the one of the environment; the numbers of the blocks as they are to be started; what
// the block's threads run in one turn, false if none could.
void read_schedule();
std::vector<uint32_t> block_order(uint64_t count);
bool turn(Block& block);

// Shared memory (memory.cpp).
void reset_shared(Block& block);
void release_shared();
bool has_copies_in_flight(const Thread& thread);

// Matrix instructions of warpgroups (wgmma.cpp).
bool has_products_in_flight(const Warp& warp);
bool warpgroups_agree(const Block& block);

// Tensor copies (bulk.cpp).
bool has_tensor_copies_in_flight(const Block& block);

// The race detector (race.cpp); all of it is empty in the other builds.
void race_begin_launch();
void race_begin_thread(Thread& thread);
void race_barrier(Block& block);
void race_warp_sync(Warp& warp, uint32_t mask);
void race_read(const void* address, size_t bytes);
void race_write(const void* address, size_t bytes);
// By wgmma: what the writer has not fenced it does not see.
void race_read_async(const void* address, size_t bytes);
// By a tensor copy, into any block's shared memory: whoever takes over `arrival` knows of it.
void race_write_bulk(Block& owner, const void* address, size_t bytes, Knowledge& arrival);
// Adds what this thread knows; takes it over.
void race_publish(Knowledge& into);
void race_acquire(const Knowledge& from);

}  // namespace megalodon::simt

// Launching, barriers and warp operations.
//
// The executor's own code is never instrumented by the race build, and runs under AddressSanitizer in the asan build.
#include "simt/executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace megalodon::simt {

Executor executor;
Builtins builtins;

namespace {

std::string triple(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// ---- barriers -------------------------------------------------------------------------------------------------------

void open_barrier(Block& block) {
  for (Thread& thread : block.threads) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
  block.waiting = 0;
  ++block.syncs;
  executor.idle_spins = 0;
  race_barrier(block);
}

// ---- warp operations ------------------------------------------------------------------------------------------------

void complete_warp_op(Warp& warp, const Thread& thread, uint32_t wanted) {
  void* operands[32] = {};
  for (uint32_t lanes = wanted; lanes != 0; lanes &= lanes - 1) {
    const int i = __builtin_ctz(lanes);
    const Thread& other = *warp.lanes[i];
    if (other.mask != thread.mask || other.op != thread.op || !(other.site == thread.site)) {
      fail("divergent warp operation: lane %u (mask %08x) at %s:%d, lane %u (mask %08x) at %s:%d", thread.lane,
           thread.mask, thread.site.file, thread.site.line, other.lane, other.mask, other.site.file, other.site.line);
    }
    operands[i] = other.operand;
  }
  thread.combine(operands, thread.mask, warp.live);
  if (thread.op == WarpOp::kSync) race_warp_sync(warp, wanted);
  for (uint32_t lanes = wanted; lanes != 0; lanes &= lanes - 1) {
    warp.lanes[__builtin_ctz(lanes)]->state = State::kReady;
  }
  warp.waiting &= ~wanted;
}

// Completes the operation `thread` waits for if every live lane of its mask is at one.
bool try_warp_op(Warp& warp, const Thread& thread) {
  const uint32_t wanted = thread.mask & warp.live;
  if ((wanted & ~warp.waiting) != 0) return false;
  complete_warp_op(warp, thread, wanted);
  return true;
}

struct BallotOperand {
  bool predicate;
  uint32_t result;
};

void combine_ballot(void* const operands[32], uint32_t, uint32_t) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) {
    if (operands[i] != nullptr && static_cast<BallotOperand*>(operands[i])->predicate) bits |= 1u << i;
  }
  for (int i = 0; i < 32; ++i) {
    if (operands[i] != nullptr) static_cast<BallotOperand*>(operands[i])->result = bits;
  }
}

// ---- threads and blocks ---------------------------------------------------------------------------------------------

void exit_thread(Thread& thread) {
  if (has_copies_in_flight(thread)) fail("the thread exits before it has waited for its asynchronous copies");
  if (overflowed(thread.fiber)) fail("stack overflow");
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  if (has_products_in_flight(warp)) fail("the warp exits before it has waited for its matrix products");
  if (block.live == 1 && !warpgroups_agree(block)) fail("the warps of a warpgroup have not issued the same wgmma");
  if (block.live == 1 && has_tensor_copies_in_flight(block)) {
    fail("the block exits before its tensor copies have come");
  }
  thread.state = State::kDone;
  --block.live;
  warp.live &= ~(1u << thread.lane);
  executor.idle_spins = 0;
  // Those who waited for this thread only wait no longer.
  for (uint32_t lanes = warp.live; lanes != 0; lanes &= lanes - 1) {
    const Thread& other = *warp.lanes[__builtin_ctz(lanes)];
    if (other.state == State::kAtWarpOp && try_warp_op(warp, other)) break;
  }
  if (block.waiting > 0 && block.waiting == block.live) open_barrier(block);
}

void thread_entry() {
  on_start();
  (*executor.body)();
  exit_thread(*executor.current);
  leave(executor.current->fiber, true);
  std::abort();
}

void allocate_memory() {
  if (executor.stacks != nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  executor.stack_bytes = 256 * 1024;
#else
  executor.stack_bytes = 64 * 1024;
#endif
  const auto map = [](size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: out of memory");
    return static_cast<char*>(memory);
  };
  executor.arenas = map(kResidentBlocks * kArenaBytes);
  executor.stacks = map(kResidentBlocks * kMaxThreads * executor.stack_bytes);
}

void start_block(uint32_t slot, uint64_t number) {
  const Launch& launch = *executor.launch;
  const dim3 grid = launch.grid;
  const dim3 shape = launch.block;
  Block& block = *executor.slots[slot];
  const uint32_t count = shape.x * shape.y * shape.z;
  block.index = {static_cast<uint32_t>(number % grid.x), static_cast<uint32_t>(number / grid.x % grid.y),
                 static_cast<uint32_t>(number / grid.x / grid.y)};
  block.number = static_cast<uint32_t>(number);
  block.active = true;
  block.live = count;
  block.waiting = 0;
  block.epoch = 1;
  block.known.clear();
  block.wgmmas.clear();
  block.rank = block.index.x % launch.cluster;
  block.syncs = block.cluster_syncs = block.bulk_writes = 0;
  block.mbarriers.clear();
  block.arena = executor.arenas + slot * kArenaBytes;
  reset_shared(block);
  block.threads.resize(count);
  block.warps.resize((count + 31) / 32);
  for (uint32_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.index = i;
    warp.live = warp.waiting = 0;
    warp.epoch = 1;
    warp.known.clear();
    warp.groups.clear();
    warp.sums.clear();
    warp.wgmmas = 0;
    warp.fenced = false;
  }
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread.linear = i;
    thread.lane = i % 32;
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->live |= 1u << thread.lane;
    thread.state = State::kReady;
    thread.copies.clear();
    thread.cluster_arrivals = 0;
    race_begin_thread(thread);
    thread.fiber.stack = executor.stacks + (slot * kMaxThreads + i) * executor.stack_bytes;
    thread.fiber.stack_bytes = executor.stack_bytes;
    prepare(thread.fiber, thread_entry);
  }
}

// ---- the launch -----------------------------------------------------------------------------------------------------

void report_deadlock() {
  std::string text = "DEADLOCK";
  int listed = 0;
  for (const auto& block : executor.slots) {
    if (!block->active) continue;
    for (const Thread& thread : block->threads) {
      if (thread.state == State::kDone || listed == 4) continue;
      ++listed;
      text += "\n  " + describe(thread) + " waits at the " +
              (thread.state == State::kAtBarrier ? "barrier " : "warp operation ") + thread.site.file + ":" +
              std::to_string(thread.site.line);
    }
  }
  executor.error = "simt: " + text;
}

bool any_ready() {
  for (const auto& block : executor.slots) {
    if (!block->active) continue;
    for (const Thread& thread : block->threads) {
      if (thread.state == State::kReady) return true;
    }
  }
  return false;
}

void run_all_blocks(uint64_t count) {
  const std::vector<uint32_t> order = block_order(count);
  const auto slots = static_cast<uint32_t>(std::min<uint64_t>(kResidentBlocks, count));
  uint64_t started = 0;
  uint64_t finished = 0;
  while (finished < count) {
    bool ran = false;
    for (uint32_t slot = 0; slot < slots; ++slot) {
      Block& block = *executor.slots[slot];
      if (!block.active) {
        if (started == count) continue;
        start_block(slot, order[started++]);
      }
      ran |= turn(block);
      if (!executor.error.empty()) return;
      if (block.live == 0) {
        block.active = false;
        executor.is_done[block.number] = true;
        ++finished;
        ran = true;
      }
    }
    if (!ran && !any_ready()) return report_deadlock();
  }
}

}  // namespace

std::string describe(const Thread& thread) {
  return std::string("kernel ") + executor.launch->kernel + ", block " + triple(thread.block->index) + ", thread " +
         triple(thread.index);
}

void yield() { leave(executor.current->fiber, false); }

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (executor.current == nullptr) throw std::runtime_error(std::string("simt: ") + text);
  executor.error = std::string("simt: ") + text + " [" + describe(*executor.current) + "]";
  for (;;) yield();  // an exception cannot cross fibers: the scheduler throws, this thread is abandoned
}

void block_barrier(Site site) {
  Thread& thread = *executor.current;
  Block& block = *thread.block;
  if (block.waiting > 0 && !(block.barrier == site)) {
    fail("divergent barrier: this thread is at %s:%d, others wait at %s:%d", site.file, site.line, block.barrier.file,
         block.barrier.line);
  }
  block.barrier = thread.site = site;
  thread.state = State::kAtBarrier;
  ++block.waiting;
  if (block.waiting == block.live) open_barrier(block);
  yield();  // the last to arrive, too: what follows starts in the order of the schedule
}

void warp_meet(uint32_t mask, WarpOp op, void* operand, Combine combine, Site site) {
  Thread& thread = *executor.current;
  if ((mask >> thread.lane & 1) == 0) {
    fail("%s:%d: the calling lane %u is not in the mask %08x", site.file, site.line, thread.lane, mask);
  }
  thread.mask = mask;
  thread.op = op;
  thread.operand = operand;
  thread.combine = combine;
  thread.site = site;
  thread.state = State::kAtWarpOp;
  thread.warp->waiting |= 1u << thread.lane;
  if (!try_warp_op(*thread.warp, thread) || executor.order == Order::kRandom) yield();
}

uint32_t lane() { return executor.current->lane; }

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  BallotOperand operand{predicate, 0};
  warp_meet(mask, WarpOp::kBallot, &operand, combine_ballot, site);
  return operand.result;
}

void spin() {
  if (++executor.idle_spins > kMaxIdleSpins) {
    fail("LIVELOCK: threads spin and nothing happens; does this block wait for one that is not running yet?");
  }
  executor.current->spun = true;
  yield();
}

void maybe_yield() {
  if (executor.order == Order::kRandom && executor.random() % 4 == 0) yield();
}

void run(const Launch& launch, const std::function<void()>& body) {
  static std::mutex mutex;  // one launch at a time, whatever thread it comes from
  const std::lock_guard<std::mutex> lock(mutex);
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > kMaxThreads || launch.block.z > 64 || blocks == 0 || launch.grid.x > 0x7fffffff ||
      launch.grid.y > 65535 || launch.grid.z > 65535 || launch.shared_bytes > kMaxSharedBytes || launch.cluster < 1 ||
      launch.cluster > kResidentBlocks || launch.grid.x % launch.cluster != 0) {
    throw std::runtime_error(std::string("simt: invalid launch configuration for kernel ") + launch.kernel);
  }
  allocate_memory();
  read_schedule();
  while (executor.slots.size() < kResidentBlocks) executor.slots.push_back(std::make_unique<Block>());
  for (const auto& block : executor.slots) block->active = false;
  executor.launch = &launch;
  executor.body = &body;
  executor.idle_spins = 0;
  executor.error.clear();
  builtins.block_dim = launch.block;
  builtins.grid_dim = launch.grid;
  executor.is_done.assign(blocks, false);
  executor.of_clusters.clear();
  race_begin_launch();
  run_all_blocks(blocks);
  release_shared();
  for (const auto& block : executor.slots) {
    for (Thread& thread : block->threads) {
      if (thread.state != State::kDone) forget(thread.fiber);
    }
  }
  executor.launch = nullptr;
  if (!executor.error.empty()) throw std::runtime_error(executor.error);
}

}  // namespace megalodon::simt

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer ends the process: say first which thread it was.
extern "C" __attribute__((visibility("default"))) void __asan_on_error() {
  using megalodon::simt::executor;
  if (executor.current != nullptr) {
    std::fprintf(stderr, "simt: error in %s\n", megalodon::simt::describe(*executor.current).c_str());
  }
}
#endif

// The race detector of the race build.
//
// In that build the kernels are compiled with -fsanitize=thread, which makes the compiler call __tsan_read4(address)
// and the like before every access; here are those functions, instead of libtsan's. For every two bytes of memory the
// shadow keeps the last write and the last read. Two accesses of different threads, at least one a write, are a race
// unless one is known to have happened before the other:
//   - in one block, a barrier lies between (block epoch), or in one warp a warp barrier (warp epoch);
//   - or the later thread has learnt of the earlier access: a fence takes down what the thread knows (all accesses
//     before the block's last barrier and the warp's last warp barrier, its own, and what it has learnt itself), a
//     following atomic write publishes that, an atomic read of the same address followed by a fence takes it over, and
//     barriers spread it. Release stores and acquire loads contain their fence.
// Both fences are asked for, as the CUDA memory model does. Only the last read is kept, so that a write after reads by
// several blocks may go unreported, and of reads by several warps these where mbarriers may order them; nothing is
// reported that is ordered.
#include "simt/executor.h"

#if defined(MEGALODON_SIMT_RACE)

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace megalodon::simt {
namespace {

constexpr uint16_t kSeveral = 0xffff;  // threads or warps
constexpr uint16_t kBulk = 0xfffe;     // stands for the thread of all tensor copies into a block's shared memory
constexpr uintptr_t kPageBytes = 4096;
constexpr uintptr_t kCellBytes = 2;

struct Access {
  uint32_t epoch = 0;  // of the block; 0: none yet
  uint32_t block;
  uint32_t warp_epoch;
  uint32_t clock;  // of the thread
  uint16_t thread, warp;
  uint16_t atomic;
  uint16_t proxy_fences;  // that the thread had made
  const void* code;
};

struct Cell {
  Access write, read;
  bool operator==(const Cell& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(std::has_unique_object_representations_v<Cell>);

std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> shadow;
// Where pages met last are, by number % kRecent: kernels change from array to array.
constexpr uintptr_t kRecent = 64;
struct {
  uintptr_t number;
  Cell* cells = nullptr;
} recent[kRecent];
std::unordered_map<const void*, Knowledge> published;  // by the atomics on this address
// Of cells that several warps have read in blocks whose warps may know of each other by mbarriers: these warps, with
// their epochs then.
std::unordered_map<uintptr_t, Knowledge> readers;

enum Level : uint64_t { kBlock, kWarp, kThread };

uint64_t key_of(Level level, uint32_t block, uint32_t index) {
  return static_cast<uint64_t>(level) << 48 | static_cast<uint64_t>(block) << 16 | index;
}

void learn(Knowledge& into, const Knowledge& from) {
  for (const auto& [key, value] : from) {
    uint32_t& known = into[key];
    known = std::max(known, value);
  }
}

// Moves what is known from one to the other.
void hand_over(Knowledge& into, Knowledge& from) {
  if (from.empty()) return;
  learn(into, from);
  from.clear();
}

bool knows(const Thread& thread, uint64_t key, uint32_t number) {
  const Knowledge* const all[] = {&thread.known, &thread.warp->known, &thread.block->known};
  for (const Knowledge* known : all) {
    if (known->empty()) continue;  // as most are
    const auto found = known->find(key);
    if (found != known->end() && found->second > number) return true;
  }
  return false;
}

// of_cell: its readers, where an access is theirs.
bool ordered(const Access& earlier, const Thread& thread, const Knowledge* of_cell = nullptr) {
  const Block& block = *thread.block;
  if (earlier.block == block.number) {
    if (earlier.epoch < block.epoch || earlier.thread == thread.linear) return true;
    if (earlier.warp == thread.warp->index && earlier.warp_epoch < thread.warp->epoch) return true;
  }
  if (knows(thread, key_of(kBlock, earlier.block, 0), earlier.epoch)) return true;
  if (earlier.warp == kSeveral) {
    if (of_cell == nullptr || earlier.block != block.number) return false;
    const uint64_t own = key_of(kWarp, block.number, thread.warp->index);
    return std::all_of(of_cell->begin(), of_cell->end(), [&](const auto& reader) {
      return knows(thread, reader.first, reader.second) || (reader.first == own && reader.second < thread.warp->epoch);
    });
  }
  if (knows(thread, key_of(kWarp, earlier.block, earlier.warp), earlier.warp_epoch)) return true;
  return earlier.thread != kSeveral && knows(thread, key_of(kThread, earlier.block, earlier.thread), earlier.clock);
}

Access access_of(const Thread& thread, bool atomic, const void* code) {
  return {thread.block->epoch,
          thread.block->number,
          thread.warp->epoch,
          thread.clock,
          static_cast<uint16_t>(thread.linear),
          static_cast<uint16_t>(thread.warp->index),
          atomic,
          thread.proxy_fences,
          code};
}

Cell* cell_of(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  auto& page = recent[number % kRecent];
  if (page.cells == nullptr || page.number != number) {
    auto& cells = shadow[number];
    if (cells == nullptr) cells = std::make_unique<Cell[]>(kPageBytes / kCellBytes);
    page = {number, cells.get()};
  }
  return page.cells + address % kPageBytes / kCellBytes;
}

// "FILE 0xOFFSET", as `addr2line -e` takes them.
std::string place_of(const void* code) {
  Dl_info info{};
  if (dladdr(code, &info) == 0) return "an unknown place";
  char offset[32];
  std::snprintf(offset, sizeof offset, " %#zx",
                static_cast<size_t>(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)) - 1);
  return info.dli_fname + std::string(offset);
}

void check(const Access& earlier, const char* what, const Access& now, const char* how, const void* address,
           const Thread& thread, const Knowledge* of_cell = nullptr) {
  if (earlier.epoch == 0 || (earlier.atomic && now.atomic) || ordered(earlier, thread, of_cell)) return;
  const char* where = executor.in_arenas(address) ? "shared" : "global";
  const std::string who = earlier.thread == kSeveral ? "several threads" : "thread " + std::to_string(earlier.thread);
  fail("RACE: %s of %s memory %p, after an unordered %s by %s of block %u (code at %s and %s)", how, where, address,
       what, who.c_str(), earlier.block, place_of(now.code).c_str(), place_of(earlier.code).c_str());
}

// What no other thread uses.
inline bool is_private(const void* pointer) {
  const auto* p = static_cast<const char*>(pointer);
  const auto* own = reinterpret_cast<const char*>(&builtins);
  return executor.on_stacks(pointer) || (p >= own && p < own + sizeof builtins);
}

const Knowledge* readers_of(uintptr_t address) {
  if (readers.empty()) return nullptr;
  const auto found = readers.find(address);
  return found == readers.end() ? nullptr : &found->second;
}

// Adds a reader to those of a cell whose last one was `last`.
void add_reader(uintptr_t address, const Access& last, const Access& now) {
  Knowledge& of_cell = readers[address];
  if (last.warp != kSeveral) of_cell = {{key_of(kWarp, last.block, last.warp), last.warp_epoch}};
  of_cell[key_of(kWarp, now.block, now.warp)] = now.warp_epoch;
}

void judge(const Thread& thread, const void* pointer, size_t bytes, bool writes, bool atomic, const void* code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Access now = access_of(thread, atomic, code);
  const Block& block = *thread.block;
  const bool shared = executor.in_arenas(pointer);
  if (shared && (pointer < block.arena || pointer >= block.arena + kArenaBytes)) {
    fail("access to the shared memory of another block");
  }
  if (bytes < kCellBytes) return;  // the other byte of the cell may rightly be another thread's
  Cell before, after;              // of the cell before this one
  bool known_before = false;       // whether it had readers
  for (size_t i = 0; i < bytes; i += kCellBytes) {
    Cell& cell = *cell_of(address + i);
    const bool known = cell.read.warp == kSeveral && readers_of(address + i) != nullptr;
    if (i > 0 && cell == before && !known && !known_before) {  // of which the same is to be said
      cell = after;
      const Knowledge* const of_before = readers_of(address + i - kCellBytes);
      if (of_before != nullptr) {
        readers[address + i] = Knowledge(*of_before);
      } else if (!readers.empty()) {
        readers.erase(address + i);
      }
      continue;
    }
    before = cell;
    known_before = known;
    const auto* at = static_cast<const char*>(pointer) + i;
    if (shared) {  // what an earlier block left in this arena does not count
      if (cell.write.block != block.number) cell.write.epoch = 0;
      if (cell.read.block != block.number) cell.read.epoch = 0;
      if (!writes && cell.write.epoch == 0) fail("read of shared memory that nobody has written");
    }
    check(cell.write, "write", now, writes ? "write" : "read", at, thread);
    if (writes) {
      check(cell.read, "read", now, "write", at, thread, readers_of(address + i));
      cell.write = now;
      cell.read.epoch = 0;
      readers.erase(address + i);
    } else {
      const Access last = cell.read;
      const bool joins = last.epoch == now.epoch && last.block == now.block && !ordered(last, thread);
      cell.read = now;
      if (joins && last.thread != now.thread) cell.read.thread = kSeveral;
      if (joins && last.warp != now.warp) {
        cell.read.warp = kSeveral;
        const bool is_known = last.warp != kSeveral || readers_of(address + i) != nullptr;
        if (shared && is_known && !block.mbarriers.empty()) add_reader(address + i, last, now);
      } else if (!joins) {
        readers.erase(address + i);
      }
    }
    after = cell;
  }
}

inline void note(const void* pointer, size_t bytes, bool writes, bool atomic, const void* code) {
  const Thread* thread = executor.current;
  if (thread != nullptr && !is_private(pointer)) judge(*thread, pointer, bytes, writes, atomic, code);
}

// Random preemption: an access is where real threads would drift apart.
inline void access(const void* address, size_t bytes, bool writes, const void* code) {
  note(address, bytes, writes, false, code);
  if (executor.current != nullptr && executor.order == Order::kRandom && executor.random() % 64 == 0) yield();
}

}  // namespace

void race_begin_launch() {
  shadow.clear();
  for (auto& page : recent) page.cells = nullptr;
  published.clear();
  readers.clear();
}

void race_begin_thread(Thread& thread) {
  thread.clock = 1;
  thread.proxy_fences = 0;
  thread.known.clear();
  thread.pending.clear();
  thread.released.clear();
}

void race_barrier(Block& block) {
  ++block.epoch;
  for (Warp& warp : block.warps) hand_over(block.known, warp.known);
  for (Thread& thread : block.threads) hand_over(block.known, thread.known);
}

void race_warp_sync(Warp& warp, uint32_t mask) {
  ++warp.epoch;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    Thread& thread = *warp.lanes[__builtin_ctz(lanes)];
    hand_over(warp.known, thread.known);
  }
}

void race_read(const void* address, size_t bytes) { note(address, bytes, false, false, __builtin_return_address(0)); }
void race_write(const void* address, size_t bytes) { note(address, bytes, true, false, __builtin_return_address(0)); }

void race_read_async(const void* address, size_t bytes) {
  note(address, bytes, false, false, __builtin_return_address(0));
  const Block& block = *executor.current->block;
  for (size_t i = 0; i < bytes; i += kCellBytes) {
    const Access& write = cell_of(reinterpret_cast<uintptr_t>(address) + i)->write;
    if (write.thread != kBulk && block.threads[write.thread].proxy_fences == write.proxy_fences) {
      fail("wgmma reads what thread %u has written (code at %s) and not made visible by fence_async_proxy",
           write.thread, place_of(write.code).c_str());
    }
  }
}

void fence_async_proxy() { ++executor.current->proxy_fences; }

void race_write_bulk(Block& owner, const void* address, size_t bytes, Knowledge& arrival) {
  const Thread& thread = *executor.current;
  const Access now = access_of(thread, false, __builtin_return_address(0));
  const uint32_t number = ++owner.bulk_writes;
  for (size_t i = 0; i < bytes; i += kCellBytes) {
    const auto* at = static_cast<const char*>(address) + i;
    Cell& cell = *cell_of(reinterpret_cast<uintptr_t>(at));
    if (cell.write.block == owner.number) check(cell.write, "write", now, "tensor copy", at, thread);
    // Of reads by several warps it is not known what each of them has published.
    if (cell.read.block == owner.number && cell.read.warp != kSeveral) {
      check(cell.read, "read", now, "tensor copy", at, thread);
    }
    cell.write = {owner.epoch, owner.number, 0, number, kBulk, kBulk, false, 0, now.code};
    cell.read.epoch = 0;
    readers.erase(reinterpret_cast<uintptr_t>(at));
  }
  arrival[key_of(kThread, owner.number, kBulk)] = number + 1;
}

void race_publish(Knowledge& into) {
  on_fence();
  learn(into, executor.current->released);
}

void race_acquire(const Knowledge& from) {
  learn(executor.current->pending, from);
  on_fence();
}

void on_fence() {
  Thread& thread = *executor.current;
  hand_over(thread.known, thread.pending);
  thread.released.clear();
  learn(thread.released, thread.known);
  learn(thread.released, thread.warp->known);
  learn(thread.released, thread.block->known);
  const uint32_t block = thread.block->number;
  thread.released[key_of(kBlock, block, 0)] = thread.block->epoch;
  thread.released[key_of(kWarp, block, thread.warp->index)] = thread.warp->epoch;
  thread.released[key_of(kThread, block, thread.linear)] = ++thread.clock;
}

void on_atomic(const void* address, int bytes, bool reads, bool writes, bool acquire, bool release) {
  Thread& thread = *executor.current;
  if (release) on_fence();
  if (reads) learn(thread.pending, published[address]);
  note(address, bytes, writes, true, __builtin_return_address(0));
  if (writes) {
    if (!reads) published[address].clear();  // a plain atomic store ends what was published before
    learn(published[address], thread.released);
    executor.idle_spins = 0;
  }
  if (acquire) on_fence();
}

}  // namespace megalodon::simt

// ---- what the compiler calls ----------------------------------------------------------------------------------------

#define MEGALODON_TRACE(size)                                                                               \
  void __tsan_read##size(void* p) { megalodon::simt::access(p, size, false, __builtin_return_address(0)); } \
  void __tsan_write##size(void* p) { megalodon::simt::access(p, size, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* p) { __tsan_read##size(p); }                                       \
  void __tsan_unaligned_write##size(void* p) { __tsan_write##size(p); }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
MEGALODON_TRACE(1)
MEGALODON_TRACE(2)
MEGALODON_TRACE(4)
MEGALODON_TRACE(8)
MEGALODON_TRACE(16)
void __tsan_read_range(void* p, size_t bytes) { megalodon::simt::access(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { megalodon::simt::access(p, bytes, true, __builtin_return_address(0)); }
}

#else

namespace megalodon::simt {

void race_begin_launch() {}
void race_begin_thread(Thread&) {}
void race_barrier(Block&) {}
void race_warp_sync(Warp&, uint32_t) {}
void race_read(const void*, size_t) {}
void race_write(const void*, size_t) {}
void race_read_async(const void*, size_t) {}
void race_write_bulk(Block&, const void*, size_t, Knowledge&) {}
void race_publish(Knowledge&) {}
void race_acquire(const Knowledge&) {}
void fence_async_proxy() {}
void on_fence() {}
void on_atomic(const void*, int, bool, bool writes, bool, bool) {
  if (writes) executor.idle_spins = 0;
}

}  // namespace megalodon::simt

#endif

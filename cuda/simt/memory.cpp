// Shared memory and asynchronous copies.
//
// A block's shared variables lie in its arena, each full of NaN bytes at first. Under AddressSanitizer what is not
// part of a variable is poisoned, so that an index that is out of range is reported at its source line.
#include <cstring>

#include "simt/executor.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace megalodon::simt {
namespace {

char* take(Block& block, size_t bytes, size_t alignment, const char* name) {
  const size_t begin = (block.arena_used + kRedZoneBytes + alignment - 1) / alignment * alignment;
  if (begin + bytes + kRedZoneBytes > kArenaBytes) fail("shared memory is exhausted at %s (%zu bytes)", name, bytes);
  block.arena_used = begin + bytes;
  char* memory = block.arena + begin;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);
#endif
  std::memset(memory, kNanByte, bytes);
  return memory;
}

void complete(const std::vector<AsyncCopy>& copies) {
  for (const AsyncCopy& copy : copies) {
    race_read(copy.global, copy.source_bytes);
    race_write(copy.shared, copy.bytes);
    if (copy.source_bytes > 0) std::memcpy(copy.shared, copy.global, copy.source_bytes);
    std::memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
}

}  // namespace

void reset_shared(Block& block) {
  block.arena_used = 0;
  block.static_bytes = 0;
  block.variables.clear();
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.arena, kArenaBytes);
#endif
  block.dynamic_shared = take(block, executor.launch->shared_bytes, 1024, "dynamic shared memory");
}

void release_shared() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(executor.arenas, kResidentBlocks * kArenaBytes);
#endif
}

void* shared_static(const void* key, size_t bytes, size_t alignment, const char* name) {
  Block& block = *executor.current->block;
  for (const auto& [known, memory] : block.variables) {
    if (known == key) return memory;
  }
  alignment = alignment < 16 ? 16 : alignment;
  block.static_bytes = (block.static_bytes + alignment - 1) / alignment * alignment + bytes;
  const size_t dynamic = executor.launch->shared_bytes, whole = (block.static_bytes + 1023) / 1024 * 1024 + dynamic;
  if (whole > kMaxSharedBytes) {
    fail("%zu bytes of shared memory, %zu of them dynamic, are more than %zu", whole, dynamic, kMaxSharedBytes);
  }
  char* memory = take(block, bytes, alignment, name);
  block.variables.emplace_back(key, memory);
  return memory;
}

void* shared_dynamic() { return executor.current->block->dynamic_shared; }

void async_copy(void* shared, const void* global, int bytes, int source_bytes) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(shared) | (source_bytes > 0 ? reinterpret_cast<uintptr_t>(global) : 0);
  if (addresses % bytes != 0) fail("an asynchronous copy of %d bytes is not aligned to as many", bytes);
  if (!executor.in_arenas(shared)) fail("the destination of an asynchronous copy is not shared memory");
  race_write(shared, bytes);
  std::memset(shared, kNanByte, bytes);
  auto& groups = executor.current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes});
}

void async_commit() {
  auto& groups = executor.current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void async_wait(int groups_left) {
  auto& groups = executor.current->copies;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    complete(groups.front());
    groups.erase(groups.begin());
  }
}

bool has_copies_in_flight(const Thread& thread) {
  for (const auto& group : thread.copies) {
    if (!group.empty()) return true;
  }
  return false;
}

}  // namespace megalodon::simt

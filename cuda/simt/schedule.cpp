// In which order blocks start and threads run, as MEGALODON_SIMT_SCHEDULE says.
#include <cstdlib>
#include <stdexcept>

#include "simt/executor.h"

namespace megalodon::simt {
namespace {

void run_one(Thread& thread) {
  executor.current = &thread;
  builtins.thread = thread.index;
  enter(thread.fiber);
  executor.current = nullptr;
}

// Lets the thread run up to its next wait. False if it cannot run, or has spun in this turn of its block.
bool step(Thread& thread) {
  if (thread.state != State::kReady || thread.spun || !executor.error.empty()) return false;
  run_one(thread);
  return true;
}

bool step_warp(Block& block, uint32_t warp, uint32_t first, uint32_t stride) {
  bool ran = false;
  for (uint32_t i = 0; i < 32; ++i) {
    const uint32_t thread = warp * 32 + (first + i * stride) % 32;
    if (thread < block.threads.size()) ran |= step(block.threads[thread]);
  }
  return ran;
}

// One warp after the other, each as far as it gets: the largest drift between warps that barriers allow.
bool turn_in_order(Block& block, bool reverse) {
  const auto warps = static_cast<uint32_t>(block.warps.size());
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (uint32_t i = 0; i < warps; ++i) {
      const uint32_t warp = reverse ? warps - 1 - i : i;
      while (reverse ? step_warp(block, warp, 31, 31) : step_warp(block, warp, 0, 1)) again = true;
    }
    ran |= again;
  }
  return ran;
}

// Every thread one step in turn.
bool turn_in_lockstep(Block& block) {
  bool ran = false;
  for (bool again = true; again; ran |= again) {
    again = false;
    for (Thread& thread : block.threads) again |= step(thread);
  }
  return ran;
}

// Random warps, for a random number of steps, their lanes in a random order.
bool turn_at_random(Block& block) {
  const auto warps = static_cast<uint32_t>(block.warps.size());
  bool ran = false;
  for (uint32_t i = 0; i < 2 * warps; ++i) {
    const uint32_t warp = executor.random() % warps;
    const uint32_t steps = 1u << (executor.random() % 8);
    for (uint32_t s = 0; s < steps; ++s) {
      const uint32_t order = executor.random();
      if (!step_warp(block, warp, order % 32, (order >> 8) | 1)) break;
      ran = true;
    }
  }
  return ran;
}

}  // namespace

// "random:7" -> Order::kRandom with seed 7.
void read_schedule() {
  const char* variable = std::getenv("MEGALODON_SIMT_SCHEDULE");
  const std::string text = variable == nullptr ? "forward" : variable;
  uint64_t seed = 1;
  if (text == "forward") {
    executor.order = Order::kForward;
  } else if (text == "reverse") {
    executor.order = Order::kReverse;
  } else if (text == "lockstep") {
    executor.order = Order::kLockstep;
  } else if (text.rfind("random:", 0) == 0) {
    executor.order = Order::kRandom;
    seed = std::strtoull(text.c_str() + 7, nullptr, 10);
  } else {
    throw std::runtime_error("simt: MEGALODON_SIMT_SCHEDULE must be forward, reverse, lockstep or random:SEED; got " +
                             text);
  }
  executor.random_state = seed * 0x9e3779b97f4a7c15ull + 1;
}

bool turn(Block& block) {
  builtins.block = block.index;
  for (Thread& thread : block.threads) thread.spun = false;
  switch (executor.order) {
    case Order::kRandom:
      return turn_at_random(block);
    case Order::kLockstep:
      return turn_in_lockstep(block);
    default:
      return turn_in_order(block, executor.order == Order::kReverse);
  }
}

// The n-th block to be started. Random: the blocks are shuffled, but those of a cluster follow each other.
std::vector<uint32_t> block_order(uint64_t count) {
  const uint32_t cluster = executor.launch->cluster;
  const uint64_t clusters = count / cluster;
  std::vector<uint64_t> order(clusters);
  for (uint64_t i = 0; i < clusters; ++i) order[i] = executor.order == Order::kReverse ? clusters - 1 - i : i;
  if (executor.order == Order::kRandom) {
    for (uint64_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[executor.random() % i]);
  }
  std::vector<uint32_t> blocks;
  for (const uint64_t i : order) {
    for (uint32_t rank = 0; rank < cluster; ++rank) {
      const uint32_t its = executor.order == Order::kReverse ? cluster - 1 - rank : rank;
      blocks.push_back(static_cast<uint32_t>(i * cluster + its));
    }
  }
  return blocks;
}

}  // namespace megalodon::simt

// Matrix instructions of a warpgroup. Each warp computes its 16 rows of the 64 by itself, when it waits: what is read
// too early is NaN, and what is overwritten too early is wrong. That the four warps issue the same is checked.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "simt/executor.h"

namespace megalodon::simt {
namespace {

constexpr int kDepths = 16, kWarps = 4;  // of an instruction, of a warpgroup

struct Descriptor {
  uint32_t address, leading, stride;

  explicit Descriptor(uint64_t bits)
      : address((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fail("wgmma: of the layouts only that swizzled by 128 bytes is known here");
    if ((bits >> 49 & 7) != 0) fail("wgmma: a pattern is not aligned to 1024 bytes");
  }
  // Of the number (row, depth), an address in shared memory.
  uint32_t place(bool transposed, int row, int depth) const {
    const uint32_t r = row, d = depth;
    const uint32_t at = transposed ? address + r / 64 * leading + d / 8 * stride + d % 8 * 128 + r % 64 * 2
                                   : address + r / 8 * stride + r % 8 * 128 + d * 2;
    return at ^ (at >> 7 & 7) << 4;
  }
};

// visit(address) of the 16-byte packs of an operand's rows [first, first + rows).
template <class Visit>
void for_packs(const Block& block, uint64_t bits, bool transposed, int first, int rows, Visit&& visit) {
  const Descriptor descriptor(bits);
  for (int row = first; row < first + rows; row += transposed ? 8 : 1) {
    for (int depth = 0; depth < kDepths; depth += transposed ? 1 : 8) {
      visit(block.arena + descriptor.place(transposed, row, depth));
    }
  }
}

// What a warp reads of both operands, as if its first lane did.
void read_operands(const Thread& thread, const Wgmma& wgmma) {
#if defined(MEGALODON_SIMT_RACE)
  if (thread.lane != 0) return;
  const auto read = [](const char* pack) { race_read_async(pack, 16); };
  const int first = static_cast<int>(thread.warp->index) % kWarps * 16;
  if (!wgmma.has_registers_of_a) for_packs(*thread.block, wgmma.a, wgmma.transposed_a, first, 16, read);
  for_packs(*thread.block, wgmma.b, wgmma.transposed_b, 0, wgmma.columns, read);
#else
  (void)thread, (void)wgmma;
#endif
}

std::vector<float> numbers(const Block& block, const Wgmma& wgmma, uint64_t bits, bool transposed, int first,
                           int rows) {
  const Descriptor descriptor(bits);
  std::vector<float> values(rows * kDepths);
  for (int row = 0; row < rows; ++row) {
    for (int depth = 0; depth < kDepths; ++depth) {
      const uint32_t at = descriptor.place(transposed, first + row, depth);
      if (at + 2 > kArenaBytes) fail("wgmma: an operand lies outside of shared memory");
      uint16_t number;
      std::memcpy(&number, block.arena + at, sizeof number);
      values[row * kDepths + depth] = wgmma.widen(number);
    }
  }
  return values;
}

// a of a warp, 16 rows, from its registers.
std::vector<float> numbers_of_registers(const IssuedWgmma& issued) {
  std::vector<float> values(16 * kDepths);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {  // halves of four registers
      const int row = lane / 4 + i / 2 % 2 * 8, depth = lane % 4 * 2 + i % 2 + i / 4 * 8;
      const auto number = static_cast<uint16_t>(issued.registers_of_a[lane][i / 2] >> i % 2 * 16);
      values[row * kDepths + depth] = issued.instruction.widen(number);
    }
  }
  return values;
}

WarpSums& sums_of(Warp& warp, float* first) {
  for (WarpSums& sums : warp.sums) {
    if (sums.registers[0] == first) return sums;
  }
  fail("wgmma: unknown sums");
}

void complete(Warp& warp, const IssuedWgmma& issued) {
  const Block& block = *warp.lanes[0]->block;
  const Wgmma& wgmma = issued.instruction;
  const int first = static_cast<int>(warp.index) % kWarps * 16;
  const auto a = wgmma.has_registers_of_a ? numbers_of_registers(issued)
                                          : numbers(block, wgmma, wgmma.a, wgmma.transposed_a, first, 16);
  const auto b = numbers(block, wgmma, wgmma.b, wgmma.transposed_b, 0, wgmma.columns);
  WarpSums& sums = sums_of(warp, issued.sums);
  const int columns = wgmma.columns / 4;  // of a lane
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2 * columns; ++i) {
      const int row = lane / 4 + i / columns * 8, c = i % columns, column = c / 2 * 8 + lane % 4 * 2 + c % 2;
      float sum = 0;
      for (int depth = 0; depth < kDepths; ++depth) sum += a[row * kDepths + depth] * b[column * kDepths + depth];
      float& value = sums.values[lane * 2 * columns + i];
      value = wgmma.adds ? value + sum : sum;
    }
  }
  if (--sums.in_flight > 0) return;
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(sums.registers[lane], &sums.values[lane * 2 * columns], 2 * columns * sizeof(float));
  }
  for (size_t i = 0; i < warp.sums.size(); ++i) {
    if (&warp.sums[i] != &sums) continue;
    warp.sums.erase(warp.sums.begin() + static_cast<std::ptrdiff_t>(i));
    break;
  }
  warp.fenced = false;
}

struct IssueOperand {
  Wgmma instruction;
  float* sums;
  const uint32_t* registers_of_a;
  Warp* warp;
};

void issue(void* const operands[32], uint32_t mask, uint32_t live) {
  if ((mask & live) != 0xffffffffu) fail("wgmma needs all 32 lanes (live %08x)", live);
  const auto& first = *static_cast<IssueOperand*>(operands[0]);
  Warp& warp = *first.warp;
  Block& block = *warp.lanes[0]->block;
  if (block.warps.size() % kWarps != 0) fail("wgmma needs whole warpgroups");
  for (int lane = 1; lane < 32; ++lane) {
    const Wgmma& other = static_cast<IssueOperand*>(operands[lane])->instruction;
    if (!(other == first.instruction)) fail("wgmma: lanes 0 and %d have different operands", lane);
  }
  // All warps of the group: in their a and b they name the whole of the operands.
  auto& of_group = block.wgmmas[warp.index / kWarps];
  if (warp.wgmmas < of_group.size()) {
    if (!(of_group[warp.wgmmas] == first.instruction)) fail("wgmma: warps of a warpgroup have different operands");
  } else {
    of_group.push_back(first.instruction);
  }
  ++warp.wgmmas;
  const int count = first.instruction.columns / 2;
  if (first.instruction.has_registers_of_a && !warp.fenced) {
    fail("wgmma: no wgmma_fence between its operand's being written and it");
  }
  WarpSums* sums = nullptr;
  for (WarpSums& known : warp.sums) {
    if (known.registers[0] == first.sums) sums = &known;
  }
  if (sums == nullptr) {
    if (!warp.fenced) fail("wgmma: no wgmma_fence between its sums' being written and it");
    sums = &warp.sums.emplace_back();
    sums->in_flight = 0;
    sums->values.resize(32 * count);
    for (int lane = 0; lane < 32; ++lane) {
      float* registers = sums->registers[lane] = static_cast<IssueOperand*>(operands[lane])->sums;
      std::memcpy(&sums->values[lane * count], registers, count * sizeof(float));
      for (int i = 0; i < count; ++i) registers[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  ++sums->in_flight;
  if (warp.groups.empty()) warp.groups.emplace_back();
  IssuedWgmma issued{first.instruction, first.sums, {}};
  for (int lane = 0; lane < 32; ++lane) {
    issued.registers_of_a[lane] = static_cast<IssueOperand*>(operands[lane])->registers_of_a;
  }
  warp.groups.back().push_back(issued);
}

struct WaitOperand {
  int groups_left;
  Warp* warp;
};

void commit(void* const operands[32], uint32_t, uint32_t) {
  auto& groups = static_cast<WaitOperand*>(operands[0])->warp->groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait(void* const operands[32], uint32_t, uint32_t) {
  const auto& operand = *static_cast<WaitOperand*>(operands[0]);
  Warp& warp = *operand.warp;
  while (static_cast<int>(warp.groups.size()) - 1 > operand.groups_left) {
    for (const IssuedWgmma& issued : warp.groups.front()) complete(warp, issued);
    warp.groups.erase(warp.groups.begin());
  }
}

}  // namespace

bool has_products_in_flight(const Warp& warp) { return !warp.sums.empty(); }

bool warpgroups_agree(const Block& block) {
  for (const Warp& warp : block.warps) {
    const auto of_group = block.wgmmas.find(warp.index / kWarps);
    if (of_group != block.wgmmas.end() && warp.wgmmas != of_group->second.size()) return false;
  }
  return true;
}

bool has_wgmma() {
  const char* variable = std::getenv("MEGALODON_SIMT_ARCHITECTURE");
  const std::string text = variable == nullptr ? "90" : variable;
  if (text != "80" && text != "90") {
    throw std::runtime_error("simt: MEGALODON_SIMT_ARCHITECTURE must be 80 or 90; got " + text);
  }
  return text == "90";
}

uint32_t shared_address(const void* shared) {
  const Block& block = *executor.current->block;
  const auto* pointer = static_cast<const char*>(shared);
  if (pointer < block.arena || pointer >= block.arena + kArenaBytes) fail("an operand is not in shared memory");
  return static_cast<uint32_t>(pointer - block.arena);
}

void wgmma(const Wgmma& instruction, float* sums, const uint32_t* registers_of_a, Site site) {
  Thread& thread = *executor.current;
  read_operands(thread, instruction);
  IssueOperand operand{instruction, sums, registers_of_a, thread.warp};
  warp_meet(0xffffffffu, WarpOp::kWgmma, &operand, issue, site);
}

void wgmma_fence() { executor.current->warp->fenced = true; }

void wgmma_commit(Site site) {
  WaitOperand operand{0, executor.current->warp};
  warp_meet(0xffffffffu, WarpOp::kWgmmaCommit, &operand, commit, site);
}

void wgmma_wait(int groups_left, Site site) {
  Thread& thread = *executor.current;
  const auto& groups = thread.warp->groups;
  for (int i = 0; i < static_cast<int>(groups.size()) - 1 - groups_left; ++i) {
    for (const IssuedWgmma& issued : groups[i]) read_operands(thread, issued.instruction);
  }
  WaitOperand operand{groups_left, thread.warp};
  warp_meet(0xffffffffu, WarpOp::kWgmmaWait, &operand, wait, site);
}

}  // namespace megalodon::simt

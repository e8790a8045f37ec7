// How the work of a pass of chunk_attention is shared among threads.
#pragma once

#include <algorithm>

#include "ops/chunk_attention.h"

namespace megalodon::cpu::MEGALODON_ISA {

// The c-th chunk of queries, or of keys, of sequence i with all they see, or are seen by.
inline Chunk chunk_of_queries(const ChunkAttention& args, int64_t i, int64_t c, int64_t h) {
  return args.sliding ? block_of_queries(args, i, c, h, args.C) : chunk_of(args, i, c, h);
}
inline Chunk chunk_of_keys(const ChunkAttention& args, int64_t i, int64_t c, int64_t h) {
  return args.sliding ? block_of_keys(args, i, c, h, args.C).chunk : chunk_of(args, i, c, h);
}

// The items of all chunks that have queries, in the order of time, head by head. A slot's items follow each other and
// are about as much work as every other slot's, whatever the lengths of sequences. The parallel loop runs over slots
// and a body uses the scratch of the first slot of its range: scratch is bounded where items are not.
class Items {
  using ChunkOf = Chunk (*)(const ChunkAttention& args, int64_t sequence, int64_t c, int64_t h);

 public:
  // `for_parts(chunk, add)` calls add(part, work) for all parts of a chunk.
  template <class ForParts>
  Items(const ChunkAttention& args, ChunkOf chunk_of, void* memory, ForParts&& for_parts)
      : args_(args), chunk_of_(chunk_of), items_(static_cast<ChunkItem*>(memory)) {
    if (args.slots == 0) return;
    for (int64_t i = 0; i < args.sequences.count; ++i) {
      const int64_t tokens = args.sequences.end(i) - args.sequences.begin(i);
      if (tokens == 0) continue;
      for (int64_t c = 0;; ++c) {
        const Chunk chunk = chunk_of(args, i, c, 0);
        if (chunk.queries() == 0) break;
        for_parts(chunk, [&](int64_t part, int64_t work) {
          items_[count_++] = {i, c, part, work_ + work / 2};
          work_ += work;
        });
      }
    }
  }

  // Calls body(chunk, its number in the sequence, part) for the items of the slots [begin, end).
  template <class Body>
  void for_each(int64_t begin, int64_t end, Body&& body) const {
    const int64_t stop = first_item(end);
    for (int64_t item = first_item(begin); item < stop; ++item) {
      const ChunkItem& at = items_[item % count_];
      body(chunk_of_(args_, at.sequence, at.chunk, item / count_), at.chunk, at.part);
    }
  }

 private:
  // The first item whose middle is not before the slot's share of the work begins.
  int64_t first_item(int64_t slot) const {
    if (count_ == 0) return 0;
    const int64_t share = slot * args_.H * work_ / args_.slots;
    const auto before = [](const ChunkItem& item, int64_t work) { return item.middle < work; };
    return share / work_ * count_ + (std::lower_bound(items_, items_ + count_, share % work_, before) - items_);
  }

  const ChunkAttention& args_;
  const ChunkOf chunk_of_;
  ChunkItem* items_;
  int64_t count_ = 0, work_ = 0;
};

}  // namespace megalodon::cpu::MEGALODON_ISA

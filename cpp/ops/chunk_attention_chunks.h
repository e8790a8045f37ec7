// Where the keys and queries of chunk_attention lie: the chunks of its sequences, on the GPU cut into strips of tiles.
#pragma once

#include "core/tensor.h"

namespace megalodon {

struct ChunkAttention {
  DType dtype;              // of q, k, v, o, the caches and all gradients
  const void* q;            // [B, L, H, S]
  const void* k;            // [B, L, H, S]
  const void* v;            // [B, L, H, E]
  const void* k_cache;      // [N, C, H, S], nullptr: none
  const void* v_cache;      // [N, C, H, E], nullptr: none
  const int64_t* position;  // [N], nullptr: 0
  Sequences sequences;      // N: the B rows, or the segments where B = 1 and L is all tokens
  int64_t H, S, E, C;
  int64_t seed;
  uint32_t drop_below;  // floor(dropout_p 2^32)
  bool sliding;
  bool drops_weights;  // dropout_p > 0 in the mode "weight"
  double kept_scale;   // of the weights that are left: 1 / (1 - dropout_p) in that mode, or 1
  bool cached;         // whether there are caches; an empty one may have no memory
  int64_t items;       // CPU: of a head, at most
  int64_t slots;       // CPU: that the items of all heads are shared among
  int64_t scratch;     // CPU: elements per slot; GPU: bytes of weights

  // The number of a token and head in lse [B, H, L].
  MEGALODON_HOST_DEVICE constexpr int64_t statistic(int64_t token, int64_t h) const {
    return (token / sequences.length * H + h) * sequences.length + token % sequences.length;
  }
};

// Chunks that the tokens of a row may lie in, keys and queries that a chunk may have.
static inline int64_t chunks_of(int64_t L, int64_t C, bool cached) { return L == 0 ? 0 : (L - 1) / C + 1 + cached; }
static inline int64_t queries_of_chunk(const ChunkAttention& args) {
  return args.sequences.length < args.C ? args.sequences.length : args.C;
}
static inline int64_t keys_of_chunk(const ChunkAttention& args) {
  if (args.sliding) return args.C - 1 + queries_of_chunk(args);
  return args.cached ? args.C : queries_of_chunk(args);
}
// Chunks of a head that the shapes allow, and how many there are if none is shorter than it must be, which decides how
// finely they are divided: segments that make more and shorter ones of the tokens do not make more work.
static inline int64_t most_chunks(const ChunkAttention& args) {
  const Sequences& s = args.sequences;
  return s.packed ? s.length / args.C + s.count * (1 + args.cached)
                  : s.count * chunks_of(s.length, args.C, args.cached);
}
static inline int64_t whole_chunks(const ChunkAttention& args) {
  const Sequences& s = args.sequences;
  return s.packed ? ceil_div(s.length, args.C) : most_chunks(args);
}

// One chunk of one sequence and head. Places 0 .. keys - 1 are its keys, first .. end - 1 its queries, of which the one
// at place i sees the keys i - C < j <= i (not sliding, all j <= i: there are no more than C places). Those below
// `cached` came before this call and are in the caches. But for blocks of keys, keys = end.
struct Chunk {
  int32_t sequence, h;
  int64_t cached, first, keys, end;
  int64_t slot;       // of place 0 in the caches, which are rings
  int64_t token;      // place r is token `token + r` of the batch
  int64_t statistic;  // place r has number `statistic + r` in lse
  uint32_t start;     // the absolute position of place 0
  MEGALODON_HOST_DEVICE constexpr int64_t queries() const { return end > first ? end - first : 0; }
};

// Chunk c of sequence i, without queries if there is no such chunk.
MEGALODON_HOST_DEVICE static inline Chunk chunk_of(const ChunkAttention& args, int64_t i, int64_t c, int64_t h) {
  Chunk chunk{};
  chunk.sequence = static_cast<int32_t>(i);
  chunk.h = static_cast<int32_t>(h);
  const int64_t position = args.position == nullptr ? 0 : args.position[i];
  const int64_t m = position % args.C, begin = args.sequences.begin(i), place = c * args.C - m;
  const int64_t left = args.sequences.end(i) - begin - place;
  chunk.first = chunk.cached = c == 0 ? m : 0;
  chunk.keys = chunk.end = args.C < left ? args.C : left;
  chunk.token = begin + place;
  chunk.statistic = args.statistic(begin, h) + place;
  chunk.start = static_cast<uint32_t>(static_cast<uint64_t>(position - m + c * args.C));
  return chunk;
}

// Sliding, the places of a sequence are the last C - 1 tokens before this call, as far as there are any, and its own.
MEGALODON_HOST_DEVICE static inline int64_t cached_of(const ChunkAttention& args, int64_t i) {
  const int64_t position = args.position == nullptr ? 0 : args.position[i];
  return position < 0 ? 0 : position < args.C ? position : args.C - 1;
}
// All that follows one of these places, as a chunk that begins there.
MEGALODON_HOST_DEVICE static inline Chunk window_of(const ChunkAttention& args, int64_t i, int64_t h, int64_t place,
                                                    int64_t cached) {
  const int64_t position = args.position == nullptr ? 0 : args.position[i], begin = args.sequences.begin(i);
  Chunk chunk{};
  chunk.sequence = static_cast<int32_t>(i);
  chunk.h = static_cast<int32_t>(h);
  chunk.first = chunk.cached = place < cached ? cached - place : 0;
  chunk.slot = (position - cached + place) % args.C;
  chunk.token = begin - cached + place;
  chunk.statistic = args.statistic(begin, h) - cached + place;
  chunk.start = static_cast<uint32_t>(static_cast<uint64_t>(position - cached + place));
  chunk.keys = chunk.end = args.sequences.end(i) - chunk.token;
  return chunk;
}

// Sliding, the c-th `size` queries of sequence i, with all keys they see.
MEGALODON_HOST_DEVICE static inline Chunk block_of_queries(const ChunkAttention& args, int64_t i, int64_t c, int64_t h,
                                                           int64_t size) {
  const int64_t cached = cached_of(args, i), query = cached + c * size;
  const int64_t place = query < args.C ? 0 : query - args.C + 1;
  Chunk chunk = window_of(args, i, h, place, cached);
  chunk.first = query - place;
  const int64_t end = chunk.first + size;
  chunk.keys = chunk.end = end < chunk.end ? end : chunk.end;
  return chunk;
}

// Sliding, the c-th `size` keys of sequence i, with all queries that see them. Blocks are counted so that the first
// query begins one: the first block may begin at a place below 0, where there is no key.
struct KeyBlock {
  Chunk chunk;
  int64_t begin;
};
MEGALODON_HOST_DEVICE static inline KeyBlock block_of_keys(const ChunkAttention& args, int64_t i, int64_t c, int64_t h,
                                                           int64_t size) {
  const int64_t cached = cached_of(args, i), begin = cached - round_up(cached, size) + c * size;
  const int64_t place = begin < 0 ? 0 : begin;
  Chunk chunk = window_of(args, i, h, place, cached);
  const int64_t end = begin - place + size;
  chunk.keys = end < chunk.keys ? end : chunk.keys;
  const int64_t seen = chunk.keys + args.C - 1;
  chunk.end = seen < chunk.end ? seen : chunk.end;
  return {chunk, begin - place};
}

// The strips of the GPU's tiles in all chunks and heads: `tile` queries, or keys, with all `partners` tiles of keys, or
// queries, that they may meet. They are numbered without knowing where sequences begin, those of a chunk one after
// another. Chunks of rows have `tiles` numbers each. Those of packed sequences, which may be short, have as many as
// they need, and sequence i's begin at first(i): for every token 1 / tile, for every chunk and for every sequence one
// more. Some numbers are left over. Sliding, a row or sequence is one run of strips, each of them its own chunk.
struct Strips {
  struct Strip {
    Chunk chunk;
    int64_t place;  // of its first query, or key; there may be none
  };
  // A tile of queries and the strips of keys it may meet, from number `strip` on, whose first key has the place `key`.
  // It is tile `index` of that strip and `index + n step` of the n-th one further: strips of a chunk count tiles of
  // queries from its first one, those of windows from their own first key. The chunk has all places that follow.
  struct QueryTile {
    Chunk chunk;
    int64_t place, strip, key, index, step;
  };
  int64_t tile, tiles, partners, per_head, count;
  int64_t per_sequence;  // of a packed one: above those of its tokens and chunks
  bool of_keys, packed, sliding;

  static Strips of(const ChunkAttention& args, int64_t tile, bool of_keys) {
    const Sequences& s = args.sequences;
    Strips strips{};
    strips.tile = tile;
    strips.of_keys = of_keys;
    strips.packed = s.packed;
    strips.sliding = args.sliding;
    if (args.sliding) {
      const int64_t before = ceil_div(args.C - 1, tile), own = ceil_div(s.length, tile);
      const int64_t cached = args.cached && of_keys ? before : 0;
      strips.tiles = own + cached;
      strips.partners = args.cached || before < own ? before + 1 : own;
      strips.per_sequence = s.packed ? 1 + cached : strips.tiles;
      strips.per_head = s.count * strips.per_sequence + (s.packed ? s.length / tile : 0);
    } else {
      const int64_t queries = ceil_div(queries_of_chunk(args), tile), keys = ceil_div(keys_of_chunk(args), tile);
      strips.tiles = of_keys ? keys : queries;
      strips.partners = of_keys ? queries : keys;
      // The first chunk of a packed sequence may have keys in the cache.
      strips.per_sequence = s.packed ? 1 + (args.cached ? (of_keys ? strips.tiles : 1) : 0)
                                     : chunks_of(s.length, args.C, args.cached) * strips.tiles;
      strips.per_head = s.count * strips.per_sequence + (s.packed ? s.length / tile + s.length / args.C : 0);
    }
    strips.count = s.length == 0 ? 0 : args.H * strips.per_head;
    return strips;
  }

  // Whether the strips that tiles of queries meet overlap, not being runs of `tiles` strips.
  constexpr bool overlap() const { return packed || sliding; }

  MEGALODON_HOST_DEVICE Strip at(const ChunkAttention& args, int64_t number) const {
    const Number n = split(args, number);
    if (n.index < 0) return {};  // wrong bounds of segments
    if (sliding && of_keys) {
      const auto [chunk, begin] = block_of_keys(args, n.sequence, n.index, n.h, tile);
      return {chunk, begin};
    }
    if (sliding) {
      const Chunk chunk = block_of_queries(args, n.sequence, n.index, n.h, tile);
      return {chunk, chunk.first};
    }
    const auto [chunk, index] = chunk_at(args, n);
    return {chunk, index * tile + (of_keys ? 0 : chunk.first)};
  }

  // Where strips are of keys: the tile of queries that has the number, if there is one.
  MEGALODON_HOST_DEVICE QueryTile queries_at(const ChunkAttention& args, int64_t number) const {
    const Number n = split(args, number);
    if (n.index < 0) return {};
    if (sliding) {
      const int64_t before = ceil_div(args.C - 1, tile), index = n.index < before ? n.index : before;
      auto [chunk, key] = block_of_keys(args, n.sequence, n.index - index, n.h, tile);
      chunk.keys = chunk.end = args.sequences.end(n.sequence) - chunk.token;
      return {chunk, key + index * tile, number - index, key, index, -1};
    }
    const auto [chunk, index] = chunk_at(args, n);
    return {chunk, chunk.first + index * tile, number - index, 0, index, 0};
  }

 private:
  struct Number {
    int64_t sequence, h, index;
  };
  struct InChunk {
    Chunk chunk;
    int64_t index;
  };

  MEGALODON_HOST_DEVICE int64_t first(const ChunkAttention& args, int64_t i) const {
    const int64_t begin = packed ? args.sequences.begin(i) : 0;
    return begin / tile + (sliding ? 0 : begin / args.C) + i * per_sequence;
  }

  MEGALODON_HOST_DEVICE Number split(const ChunkAttention& args, int64_t number) const {
    const int64_t h = number / per_head, n = number % per_head;
    const int64_t i =
        packed ? args.sequences.last_of([&](int64_t j) { return first(args, j) <= n; }) : n / per_sequence;
    return {i, h, n - first(args, i)};
  }

  MEGALODON_HOST_DEVICE InChunk chunk_at(const ChunkAttention& args, const Number& n) const {
    const Chunk chunk = chunk_of(args, n.sequence, 0, n.h);
    const int64_t of_first = packed ? ceil_div(of_keys ? chunk.keys : chunk.queries(), tile) : tiles;
    if (n.index < of_first) return {chunk, n.index};
    return {chunk_of(args, n.sequence, 1 + (n.index - of_first) / tiles, n.h), (n.index - of_first) % tiles};
  }
};

}  // namespace megalodon

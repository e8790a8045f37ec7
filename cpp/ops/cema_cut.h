// How a GPU cuts the time of CEMA, by shape alone: into pieces inside the sequences (core/sequences.h), which blocks of
// threads walk through, and states that go from piece to piece of a sequence.
#pragma once

#include "core/parallel.h"
#include "core/sequences.h"

namespace megalodon {

struct CemaCut {
  // Few blocks: sequences are cut, for two blocks on each of the 132 processors of an H100. Many: a block takes several
  // pieces, one after the other.
  static constexpr int64_t kWantedBlocks = 264, kManyBlocks = 1056;
  static constexpr int64_t kMostSteps = int64_t{1} << 30;  // of a piece: an int counts them

  Sequences sequences;
  int64_t length;  // steps of a piece, but for the last of a sequence
  Parts parts;     // of the numbers of pieces

  // `tiles`: blocks of threads side by side, of the channels. Sequences are cut where there are fewer than `few` blocks
  // without that, into pieces of at least `least` and a multiple of `unit` steps. Nothing is known of the lengths of
  // packed sequences: one of them may have all tokens.
  static constexpr CemaCut of(const Sequences& sequences, int64_t tiles, int64_t few, int64_t least, int64_t unit) {
    const int64_t L = sequences.length, blocks = tiles * (sequences.packed ? 1 : sequences.count);
    int64_t length = L;
    if (blocks > 0 && blocks < few && L > least) {
      const int64_t wanted = ceil_div(kWantedBlocks, blocks), most = ceil_div(L, least);
      length = ceil_div(L, wanted < most ? wanted : most);
    }
    length = round_up(length < 1 ? 1 : length > kMostSteps ? kMostSteps : length, unit);
    return {sequences, length, Parts::of(sequences.pieces(length), 1, tiles == 0 ? 1 : ceil_div(kManyBlocks, tiles))};
  }
  constexpr bool cuts() const { return length < sequences.length; }

  // The pieces but the first of their sequences have places for the states they begin with: a sequence's are
  // neighbours, and floor(begin / length) is another number for each of them.
  constexpr int64_t places() const { return cuts() ? sequences.tokens() / length : 0; }
  MEGALODON_HOST_DEVICE int64_t place(int64_t sequence, int64_t index) const {
    return sequences.begin(sequence) / length + index - 1;
  }
  // Of the states that all pieces end with.
  constexpr int64_t ends() const { return sequences.tokens() / length + sequences.count; }
  MEGALODON_HOST_DEVICE int64_t end(int64_t sequence, int64_t index) const {
    return place(sequence, index) + 1 + sequence;
  }
};

}  // namespace megalodon

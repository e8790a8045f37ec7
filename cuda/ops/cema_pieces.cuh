// The walk of a block of threads through the pieces of time of its part (ops/cema_cut.h), some steps at once.
#pragma once

#include "core/portable.cuh"
#include "ops/cema_cut.h"

namespace megalodon::cuda {

// Where a walk is: positions [first, first + steps) of a piece. Position p of a sequence is its token p or, where time
// runs back, token mirror - p.
struct PieceCursor {
  Sequences::Piece piece;
  int64_t mirror, first;
  int steps;

  DEVICE bool begins() const { return first == piece.begin; }
  DEVICE bool ends() const { return first + steps == piece.end; }
  DEVICE int64_t token(bool reverse, int64_t position) const { return reverse ? mirror - position : position; }
};

struct PieceWalk {
  const CemaCut& cut;
  int most;         // steps at once
  bool skips_last;  // whether the last pieces of sequences are left out
  int64_t stop, stop_index;

  DEVICE PieceWalk(const CemaCut& cut_of, int64_t part, int most_of, bool skips_last_of)
      : cut(cut_of), most(most_of), skips_last(skips_last_of) {
    const auto behind = cut.sequences.piece_from(cut.parts.end(part), cut.length);
    stop = behind.sequence;
    stop_index = behind.index;
  }
  DEVICE PieceCursor begin(int64_t part) const {
    return at(cut.sequences.piece_from(cut.parts.begin(part), cut.length));
  }
  DEVICE bool is_past(const Sequences::Piece& piece) const {
    return piece.sequence > stop || (piece.sequence == stop && piece.index >= stop_index);
  }
  DEVICE PieceCursor after(const PieceCursor& c) const {
    if (c.ends()) return at(cut.sequences.after(c.piece, cut.length));
    PieceCursor next = c;
    next.first += c.steps;
    next.steps = steps_of(c.piece.end - next.first);
    return next;
  }

 private:
  DEVICE int steps_of(int64_t left) const { return left < most ? static_cast<int>(left) : most; }
  DEVICE PieceCursor at(Sequences::Piece piece) const {
    while (skips_last && piece.last && !is_past(piece)) piece = cut.sequences.after(piece, cut.length);
    int64_t mirror = 0;
    if (!is_past(piece)) mirror = cut.sequences.begin(piece.sequence) + cut.sequences.end(piece.sequence) - 1;
    return {piece, mirror, piece.begin, steps_of(piece.tokens())};
  }
};

}  // namespace megalodon::cuda

// The walk of a block of threads through the pieces of time of its part (ops/cema_cut.h), some steps at once.
#pragma once

#include "core/portable.cuh"
#include "ops/cema_cut.h"

namespace megalodon::cuda {

// Where a walk is. As small as can be, since it lives in registers.
struct PieceCursor {
  int64_t sequence;
  int64_t token;         // of the next step
  int index;             // of the piece, counted in the direction of the walk
  int left;              // steps of the piece from there on
  int steps;             // of these at once; -1 where the walk is over
  bool begins, is_last;  // the piece begins here; it is its sequence's last one

  DEVICE bool exists() const { return steps >= 0; }
  DEVICE bool ends() const { return left == steps; }
};

struct PieceWalk {
  const CemaCut& cut;
  int64_t past;  // the number of the first piece that is another part's
  int most;      // steps at once
  bool reverse, skips_last;

  // `skips_last`: without the last pieces of sequences.
  DEVICE PieceWalk(const CemaCut& cut_of, int most_of, bool is_reverse, bool does_skip_last)
      : cut(cut_of),
        past(cut_of.parts.end(blockIdx.y)),
        most(most_of),
        reverse(is_reverse),
        skips_last(does_skip_last) {}
  DEVICE PieceCursor begin() const { return at(cut.sequences.piece_from(cut.parts.begin(blockIdx.y), cut.length)); }
  DEVICE PieceCursor after(const PieceCursor& c) const {
    if (c.ends()) {
      Sequences::Piece piece{};
      piece.sequence = c.sequence;
      piece.index = c.index;
      piece.last = c.is_last;
      return at(cut.sequences.after(piece, cut.length));
    }
    PieceCursor next = c;
    next.token += reverse ? -c.steps : c.steps;
    next.left -= c.steps;
    next.steps = steps_of(next.left);
    next.begins = false;
    return next;
  }

 private:
  DEVICE int steps_of(int left) const { return left < most ? left : most; }
  DEVICE PieceCursor at(Sequences::Piece p) const {
    const Sequences& all = cut.sequences;
    const auto is_mine = [&] { return p.exists && all.first_piece(p.sequence, cut.length) + p.index < past; };
    bool exists = is_mine();
    while (skips_last && exists && p.last) {
      p = all.after(p, cut.length);
      exists = is_mine();
    }
    int64_t token = p.begin;
    if (reverse && exists) token = all.begin(p.sequence) + all.end(p.sequence) - 1 - p.begin;
    const int left = static_cast<int>(p.tokens());
    return {p.sequence, token, static_cast<int>(p.index), left, exists ? steps_of(left) : -1, true, p.last};
  }
};

}  // namespace megalodon::cuda

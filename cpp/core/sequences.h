// The sequences of a batch: its B rows of L tokens, or, where cu_seqlens is given, the segments of its one packed row.
//
// Tokens are numbered through the batch (token t of row b is b L + t), so a kernel that works on the tokens begin(i) ..
// end(i) - 1 of sequence i, and keeps its state in row i of the state tensors, knows both cases.
//
// Time is cut into pieces of `size` tokens, the last one of a sequence being shorter, without knowing the lengths when
// the grid is chosen: sequence i's pieces have the numbers from begin(i) / size + i on, of which there are always
// enough, as floor((b + n) / size) - floor(b / size) + 1 >= ceil(n / size). The numbers left over are empty pieces.
//
// On a GPU the values of cu_seqlens are not checked, since no launcher waits for the device: they are clamped instead,
// so that wrong ones give wrong results but stay inside the tensors.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace megalodon {

struct Sequences {
  int64_t count;           // B, or the number of segments
  int64_t length;          // no sequence is longer: L, or all tokens of the packed row
  const void* cu_seqlens;  // [count + 1], nullptr: rows
  bool is_int64;           // cu_seqlens; otherwise int32
  bool packed;             // whether cu_seqlens is given (in a dry run it has no memory)

  static constexpr Sequences of_rows(int64_t B, int64_t L) { return {B, L, nullptr, false, false}; }

  MEGALODON_HOST_DEVICE constexpr int64_t tokens() const { return packed ? length : count * length; }
  MEGALODON_HOST_DEVICE int64_t begin(int64_t i) const { return packed ? clamped(at(i), 0) : i * length; }
  MEGALODON_HOST_DEVICE int64_t end(int64_t i) const {
    return packed ? clamped(at(i + 1), begin(i)) : (i + 1) * length;
  }

  // A run of tokens of one sequence. `index` counts the sequence's `count` pieces from its start; an empty sequence has
  // one piece, which is empty and its last one.
  struct Piece {
    int64_t sequence, index, count, begin, end;
    bool exists, last;
    MEGALODON_HOST_DEVICE constexpr int64_t tokens() const { return end - begin; }
  };

  // How many numbers pieces have; known from the shapes.
  MEGALODON_HOST_DEVICE constexpr int64_t pieces(int64_t size) const {
    if (count == 0) return 0;
    return packed ? length / size + count : count * pieces_of(length, size);
  }
  MEGALODON_HOST_DEVICE int64_t first_piece(int64_t i, int64_t size) const {
    return packed ? begin(i) / size + i : i * pieces_of(length, size);
  }
  MEGALODON_HOST_DEVICE Piece piece(int64_t number, int64_t size) const {
    const int64_t i =
        packed ? last_of([&](int64_t j) { return first_piece(j, size) <= number; }) : number / pieces_of(length, size);
    return piece_of(i, number - first_piece(i, size), size);
  }
  // To walk through the pieces that exist: the first of them with this number or a higher one, and the one behind
  // another. Behind the last one is one of sequence `count`, which does not exist.
  MEGALODON_HOST_DEVICE Piece piece_from(int64_t number, int64_t size) const {
    const Piece p = piece(number, size);
    return p.exists ? p : piece_of(p.sequence + 1, 0, size);
  }
  MEGALODON_HOST_DEVICE Piece after(const Piece& p, int64_t size) const {
    return p.last ? piece_of(p.sequence + 1, 0, size) : piece_of(p.sequence, p.index + 1, size);
  }

  // The sequence that a token belongs to.
  MEGALODON_HOST_DEVICE int64_t of_token(int64_t token) const {
    return packed ? last_of([&](int64_t j) { return begin(j) <= token; }) : token / length;
  }

  // The last sequence for which `holds`, which holds up to some sequence; 0 if it holds for none.
  template <class Holds>
  MEGALODON_HOST_DEVICE int64_t last_of(Holds&& holds) const {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (holds(middle)) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  MEGALODON_HOST_DEVICE Piece piece_of(int64_t i, int64_t index, int64_t size) const {
    if (i >= count) return {count, 0, 0, tokens(), tokens(), false, true};
    const int64_t b = begin(i), e = end(i), n = pieces_of(e - b, size);
    if (index < 0 || index >= n) return {i, index, n, e, e, false, false};
    const int64_t from = b + index * size;
    return {i, index, n, from, from + size < e ? from + size : e, true, index == n - 1};
  }
  static MEGALODON_HOST_DEVICE constexpr int64_t pieces_of(int64_t tokens, int64_t size) {
    return tokens <= size ? 1 : (tokens - 1) / size + 1;
  }
  MEGALODON_HOST_DEVICE int64_t at(int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(cu_seqlens)[i] : static_cast<const int32_t*>(cu_seqlens)[i];
  }
  MEGALODON_HOST_DEVICE constexpr int64_t clamped(int64_t value, int64_t least) const {
    return value < least ? least : value > length ? length : value;
  }
};

}  // namespace megalodon

// timestep_norm: every group of K = D / G consecutive channels normalised by its mean and variance over all time steps
// so far. A step weighs 1 (not K), with the mean mu and the biased variance s of its group:
//   n' = n + 1,  c1 = n / n',  c2 = 1 / n',
//   M' = c1 M + c2 mu,  V' = c1 V + c2 s + c1 c2 (mu - M)^2,
//   y = (x - M') * r * (weight + 1) + bias,  r = 1 / sqrt(V' + eps).
// A padded step leaves n, M and V as they are and gives y = 0. Without a state: n = 0, M = 0, V = 1. Sequences are the
// rows of x, or with cu_seqlens the segments of its one packed row; each has its own statistics.
//
// Backward goes from the last step to the first, with u = dy * (weight + 1) and the adjoints aM, aV of M' and V', which
// start as dmean and dvar. At a step, sums being over the group:
//   aM -= r sum(u),   aV -= r^3 sum(u * (x - M')) / 2,
//   dx = r u + c2 (aM + 2 aV (x - M')) / K,
//   aM <- c1 aM - 2 c2 aV (mu - M'),   aV <- c1 aV.
// That needs of the forward only M', r and the counts: mu - M' = c1 (mu - M) is the mean of x - M', so no step reads
// the mean of the one before, and a padded step simply does nothing (its dx is 0). At the start aM, aV are dmean0,
// dvar0.
#pragma once

#include "core/isa.h"
#include "core/parallel.h"
#include "core/parameter_sums.h"
#include "core/tensor.h"

namespace megalodon {

// Some groups of channels, which go through time together.
struct TimestepNormTiles {
  static constexpr int64_t kMaxGroups = 128;  // their state is on the stack
  static constexpr int64_t kChannels = 4096;  // as wide as L2 allows: memory is fastest in one piece
  int64_t groups;                             // of a tile, but for the last
  int64_t tiles;

  // Always inlined: not to be shared between instruction sets (core/isa.h).
  __attribute__((always_inline)) static constexpr TimestepNormTiles of(int64_t narrowest, int64_t G, int64_t K) {
    int64_t channels = kChannels;
    while (channels > narrowest && channels >= G * K) channels /= 2;
    int64_t groups = K < 1 ? kMaxGroups : channels / K;
    groups = groups < 1 ? 1 : groups > kMaxGroups ? kMaxGroups : groups;
    if (groups > 16) groups -= groups % 16;  // whole blocks of every vector width
    return {groups, (G + groups - 1) / groups};
  }
};

// What a thread does at a time is a tile of the sequences of one part. Parts are one or more rows; or segments of about
// equally many tokens, counting one more for each of them, as there may be thousands of empty ones. They depend on the
// shapes and cu_seqlens alone, and so do sums over parts. Of a long part the tiles are narrow, as of a single sequence:
// threads share it.
struct TimestepNormItems {
  static constexpr int64_t kLeast = 128;  // tokens of a part of segments
  static constexpr int64_t kLong = 8;     // parts of more than 1 / kLong of the tokens have narrow tiles
  Sequences sequences;
  int64_t parts;
  TimestepNormTiles narrow, wide;

  struct Item {
    int64_t part, begin, end;  // the part's sequences
    int64_t first_group, groups;
  };

  __attribute__((always_inline)) static constexpr TimestepNormItems of(const Sequences& sequences, int64_t most_rows,
                                                                       int64_t narrowest, int64_t G, int64_t K) {
    const int64_t full = sequences.tokens() / kLeast;
    const int64_t most = !sequences.packed ? most_rows : full < Parts::kMaxParts ? full : Parts::kMaxParts;
    const int64_t parts = sequences.count < most ? sequences.count : most;
    const bool one = sequences.count == 1, narrow = sequences.packed || one;
    return {sequences, parts < 1 ? 1 : parts,
            TimestepNormTiles::of(narrow ? narrowest : TimestepNormTiles::kChannels, G, K),
            TimestepNormTiles::of(one && !sequences.packed ? narrowest : TimestepNormTiles::kChannels, G, K)};
  }
  __attribute__((always_inline)) constexpr int64_t count() const { return parts * narrow.tiles; }
  // Calls body(item) for the numbers [begin, end) of one thread: narrow tiles of a part that it has side by side are
  // one, of at most the widest, since rows are read fastest in one piece.
  template <class Body>
  __attribute__((always_inline)) void for_each(int64_t begin, int64_t end, int64_t G, int64_t K, Body&& body) const {
    const int64_t most = TimestepNormTiles::of(TimestepNormTiles::kChannels, G, K).groups;
    while (begin < end) {
      Item item = at(begin++, G);
      for (; begin < end; ++begin) {
        const Item next = at(begin, G);
        if (next.part != item.part || item.groups + next.groups > most) break;
        item.groups += next.groups;
      }
      if (item.groups > 0) body(item);
    }
  }

 private:
  // The tiles of a long part are narrow. Of another one a wide tile may stand for several numbers: those left over have
  // no groups.
  __attribute__((always_inline)) Item at(int64_t number, int64_t G) const {
    const int64_t part = number / narrow.tiles, begin = first(part), end = first(part + 1);
    const bool is_long =
        sequences.packed && begin < end && sequences.end(end - 1) - sequences.begin(begin) > sequences.tokens() / kLong;
    const TimestepNormTiles& tiles = is_long ? narrow : wide;
    const int64_t from = number % narrow.tiles * tiles.groups, left = G - from;
    return {part, begin, end, from, left < 0 ? 0 : left < tiles.groups ? left : tiles.groups};
  }

  int64_t first(int64_t part) const {
    if (parts == sequences.count) return part;
    if (!sequences.packed || part == parts) return sequences.count * part / parts;
    const int64_t before = (sequences.tokens() + sequences.count) * part / parts;
    return sequences.last_of([&](int64_t i) { return sequences.begin(i) + i <= before; });
  }
};

// The CUDA kernels cut time into tiles of kSteps steps. Every group of every row is a chain of tiles, in which a tile
// gets what came before it through the workspace: a slot for every tile and one for every whole window of tiles
// (cuda/core/look_back.cuh). They take tiles by ticket, so that a tile waits for none that may never run. The segments
// of a packed row are one chain, in which no tile looks back beyond its segment.
struct TimestepNormChains {
  static constexpr int64_t kSteps = 32;
  static constexpr int64_t kWindow = 32;
  static constexpr int64_t kSlotBytes = 32;
  static constexpr int64_t kTicketBytes = 64;
  int64_t rows, G;
  int64_t tiles;  // of a row: the pieces of its sequences, at least 1 where there are rows
  bool one_each;  // no sequence has more than one tile, hence none looks back

  static constexpr TimestepNormChains of(const Sequences& sequences, int64_t G) {
    const int64_t rows = sequences.packed ? 1 : sequences.count;
    return {rows, G, rows == 0 ? 0 : sequences.pieces(kSteps) / rows, sequences.length <= kSteps};
  }
  MEGALODON_HOST_DEVICE constexpr int64_t slots() const { return tiles + tiles / kWindow; }  // of a chain
  constexpr int64_t slot_bytes() const { return rows * G * slots() * kSlotBytes; }
};

// A tile is narrower than it could be only to give two threads work on one sequence. Forward, one thread with whole
// rows is faster than two with pieces of them that are shorter than this (float32, D = 512, AMD Zen 4: 1.4 to 2.4 ms).
struct TimestepNormForward {
  static constexpr int64_t kNarrowest = 1024;  // channels

  DType dtype;                  // of x and y
  const void* x;                // [tokens, D]
  const void* weight;           // [D] stat
  const void* bias;             // [D] stat
  const int64_t* count;         // [sequences], nullptr: no state is given
  const void* mean;             // [sequences, G] stat, nullptr with count
  const void* var;              // [sequences, G] stat, nullptr with count
  const uint8_t* padding_mask;  // [tokens], nullptr: nothing is padded
  void* y;                      // [tokens, D]
  int64_t* last_count;          // [sequences]
  void* last_mean;              // [sequences, G] stat
  void* last_var;               // [sequences, G] stat
  void* step_mean;              // [tokens, G] stat
  void* step_rstd;              // [tokens, G] stat
  void* workspace;              // CUDA, where a sequence has several tiles: the ticket, then the chains' slots
  Sequences sequences;
  int64_t D, G;
  double eps;

  int64_t K() const { return D / G; }
  __attribute__((always_inline)) TimestepNormItems items() const {
    return TimestepNormItems::of(sequences, sequences.count, kNarrowest, G, K());
  }
  TimestepNormChains chains() const { return TimestepNormChains::of(sequences, G); }
  int64_t workspace_bytes(bool on_cuda) const {
    return on_cuda && !chains().one_each ? TimestepNormChains::kTicketBytes + chains().slot_bytes() : 0;
  }
};

struct TimestepNormBackward {
  static constexpr int64_t kNarrowest = 256;  // channels

  DType dtype;                  // of dy, x and dx
  const void* dy;               // [tokens, D]
  const void* dmean;            // [sequences, G] stat, nullptr: 0
  const void* dvar;             // [sequences, G] stat, nullptr: 0
  const void* x;                // [tokens, D]
  const void* weight;           // [D] stat
  const int64_t* count;         // [sequences], nullptr: no state was given
  const uint8_t* padding_mask;  // [tokens], nullptr: nothing is padded
  const void* step_mean;        // [tokens, G] stat
  const void* step_rstd;        // [tokens, G] stat
  void* dx;                     // [tokens, D]
  void* dweight;                // [D] stat
  void* dbias;                  // [D] stat
  void* dmean0;                 // [sequences, G] stat, nullptr with count
  void* dvar0;                  // [sequences, G] stat, nullptr with count
  void* workspace;              // CPU: parameter sums of dweight, dbias; CUDA: TimestepNormBackwardRoom
  Sequences sequences;
  int64_t D, G;

  int64_t K() const { return D / G; }
  __attribute__((always_inline)) TimestepNormItems items() const {
    return TimestepNormItems::of(sequences, Parts::kMaxParts, kNarrowest, G, K());
  }
  TimestepNormChains chains() const { return TimestepNormChains::of(sequences, G); }
  int64_t workspace_bytes(bool on_cuda) const;
};

// The workspace of the CUDA backward kernel, in this order; what stands before `counts` starts as 0. Tiles are numbered
// from the end of time, the rows' tiles of one number side by side, and add their sums of dweight and dbias to part
// number % parts, in turn: few enough parts to stay in L2, enough of them that a tile seldom waits for its turn.
struct TimestepNormBackwardRoom {
  int64_t parts;
  int64_t slots;   // bytes from the start, behind the ticket
  int64_t turns;   // [G, parts] uint32: of a slice of groups, how many tiles have added to a part
  int64_t counts;  // [rows, tiles + sequences of a row] int64: the unpadded steps of a sequence before each of its
                   // tiles and behind the last; only with a mask
  int64_t sums;    // [2, parts, D] stat
  int64_t bytes;

  static constexpr TimestepNormBackwardRoom of(const TimestepNormChains& chains, int64_t sequences, int64_t D,
                                               bool masked, DType stat) {
    const int64_t wanted = (int64_t{1} << 18) / (D < 1 ? 1 : D);
    const int64_t most = chains.rows * chains.tiles;
    TimestepNormBackwardRoom room{};
    room.parts = wanted < 32 ? 32 : wanted > 1024 ? 1024 : wanted;
    if (room.parts > most) room.parts = most;
    room.slots = TimestepNormChains::kTicketBytes;
    room.turns = room.slots + chains.slot_bytes();
    room.counts = round_up(room.turns + chains.G * room.parts * 4, 16);
    room.sums = round_up(room.counts + (masked ? (most + sequences) * 8 : 0), 16);
    room.bytes = room.sums + 2 * room.parts * D * size_of(stat);
    return room;
  }
};

inline int64_t TimestepNormBackward::workspace_bytes(bool on_cuda) const {
  const DType stat = stat_dtype(dtype);
  return on_cuda ? TimestepNormBackwardRoom::of(chains(), sequences.count, D, padding_mask != nullptr, stat).bytes
                 : parameter_sums_bytes(items().parts, 2 * D, stat);
}

// What both directions check alike.
struct TimestepNormInputs {
  Tensor x, weight, count, mean, var, padding_mask;
  Sequences sequences;
  Dim rows, B, L, D, G;  // rows: of a state
  DType stat;
};

static inline TimestepNormInputs check_timestep_norm_inputs(Checker& c, const DLTensor* x, const DLTensor* weight,
                                                            const DLTensor* count, const DLTensor* mean,
                                                            const DLTensor* var, const DLTensor* padding_mask,
                                                            const DLTensor* cu_seqlens, int64_t num_groups) {
  TimestepNormInputs in{};
  in.x = c.activation("x", x, {any("B"), any("L"), any("D")});
  in.B = in.x.dim(0, "B");
  in.L = in.x.dim(1, "L");
  in.D = in.x.dim(2, "D");
  in.G = Dim{"G", num_groups};
  in.stat = stat_dtype(in.x.dtype);
  c.at_least("num_groups", num_groups, 1);
  c.require(in.D.size % num_groups == 0, "num_groups",
            "a divisor of D = " + std::to_string(in.D.size) + " (x.shape[2])", std::to_string(num_groups));
  in.weight = c.tensor("weight", weight, in.stat, {in.D});
  in.sequences = c.sequences(in.x, cu_seqlens);
  in.rows = Checker::rows_of(in.x, in.sequences);
  in.count = c.optional("count", count, DType::kInt64, {in.rows});
  in.mean = c.optional("mean", mean, in.stat, {in.rows, in.G});
  in.var = c.optional("var", var, in.stat, {in.rows, in.G});
  c.require(in.count.present == in.mean.present && in.mean.present == in.var.present, "count, mean and var",
            "given all three or none",
            std::string("count ") + (in.count.present ? "given" : "none") + ", mean " +
                (in.mean.present ? "given" : "none") + ", var " + (in.var.present ? "given" : "none"));
  in.padding_mask = c.optional("padding_mask", padding_mask, DType::kBool, {in.B, in.L});
  return in;
}

static inline TimestepNormForward check_timestep_norm(Checker& c, const DLTensor* x, const DLTensor* weight,
                                                      const DLTensor* bias_in, int64_t num_groups, double eps,
                                                      const DLTensor* count, const DLTensor* mean, const DLTensor* var,
                                                      const DLTensor* padding_mask, const DLTensor* cu_seqlens,
                                                      Outputs&& out) {
  const TimestepNormInputs in =
      check_timestep_norm_inputs(c, x, weight, count, mean, var, padding_mask, cu_seqlens, num_groups);
  const Tensor bias = c.tensor("bias", bias_in, in.stat, {in.D});
  c.positive("eps", eps, in.stat);
  const int64_t B = in.B.size, L = in.L.size, G = num_groups, rows = in.rows.size;
  TimestepNormForward args{};
  args.dtype = in.x.dtype;
  args.x = in.x.data;
  args.weight = in.weight.data;
  args.bias = bias.data;
  args.count = static_cast<const int64_t*>(in.count.data);
  args.mean = in.mean.data;
  args.var = in.var.data;
  args.padding_mask = static_cast<const uint8_t*>(in.padding_mask.data);
  args.y = out.like(c, "y", in.x);
  args.last_count = static_cast<int64_t*>(out.next(c, "count", DType::kInt64, {rows}));
  args.last_mean = out.next(c, "mean", in.stat, {rows, G});
  args.last_var = out.next(c, "var", in.stat, {rows, G});
  args.step_mean = out.next(c, "step_mean", in.stat, {B, L, G});
  args.step_rstd = out.next(c, "step_rstd", in.stat, {B, L, G});
  args.sequences = in.sequences;
  args.D = in.D.size;
  args.G = G;
  args.eps = eps;
  args.workspace = out.workspace(c, args.workspace_bytes(c.on_cuda()));
  return args;
}

static inline TimestepNormBackward check_timestep_norm_backward(
    Checker& c, const DLTensor* dy_in, const DLTensor* dmean_in, const DLTensor* dvar_in, const DLTensor* x,
    const DLTensor* weight, const DLTensor* count, const DLTensor* mean, const DLTensor* var,
    const DLTensor* padding_mask, const DLTensor* cu_seqlens, const DLTensor* step_mean_in,
    const DLTensor* step_rstd_in, int64_t num_groups, double eps, Outputs&& out) {
  const TimestepNormInputs in =
      check_timestep_norm_inputs(c, x, weight, count, mean, var, padding_mask, cu_seqlens, num_groups);
  const Tensor dy = c.like("dy", dy_in, in.x);
  const Tensor dmean = c.optional("dmean", dmean_in, in.stat, {in.rows, in.G});
  const Tensor dvar = c.optional("dvar", dvar_in, in.stat, {in.rows, in.G});
  const Tensor step_mean = c.tensor("step_mean", step_mean_in, in.stat, {in.B, in.L, in.G});
  const Tensor step_rstd = c.tensor("step_rstd", step_rstd_in, in.stat, {in.B, in.L, in.G});
  c.positive("eps", eps, in.stat);
  TimestepNormBackward args{};
  args.dtype = in.x.dtype;
  args.dy = dy.data;
  args.dmean = dmean.data;
  args.dvar = dvar.data;
  args.x = in.x.data;
  args.weight = in.weight.data;
  args.count = static_cast<const int64_t*>(in.count.data);
  args.padding_mask = static_cast<const uint8_t*>(in.padding_mask.data);
  args.step_mean = step_mean.data;
  args.step_rstd = step_rstd.data;
  args.sequences = in.sequences;
  args.D = in.D.size;
  args.G = num_groups;
  args.dx = out.like(c, "dx", in.x);
  args.dweight = out.like(c, "dweight", in.weight);
  args.dbias = out.next(c, "dbias", in.stat, {in.D.size});
  args.dmean0 = out.gradient(c, "dmean0", in.mean, in.stat);
  args.dvar0 = out.gradient(c, "dvar0", in.var, in.stat);
  if (!in.mean.present) args.dmean0 = args.dvar0 = nullptr;
  args.workspace = out.workspace(c, args.workspace_bytes(c.on_cuda()));
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(timestep_norm_forward, TimestepNormForward)
MEGALODON_KERNEL_BF16(timestep_norm_backward, TimestepNormBackward)

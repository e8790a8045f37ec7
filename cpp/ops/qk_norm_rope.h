// qk_norm_rope: the queries and keys of normalised attention, made of one shared z of H heads of S components.
//
//   zn = z * rstd,   rstd = 1 / sqrt(mean over S of z^2 + eps)   per token and head
//   q = rope(zn * (gamma[0] + 1) / sqrt(S) + beta[0]),   k = rope(zn * (gamma[1] + 1) / sqrt(S) + beta[1])
// rope turns the pair (u[2j], u[2j+1]) by the angle p * base^(-2j/S), p = (position[b] + t) mod chunk_size. With
// cu_seqlens, z is one packed row of T tokens, and b is the segment of a token, t its place in there.
//
// Gradients, with uq, uk = the gradients of q, k turned back and s_i = (gamma[i] + 1) / sqrt(S):
//   dbeta = sum of (uq, uk), dgamma = sum of (uq, uk) * zn / sqrt(S) over tokens,
//   dzn = uq s_0 + uk s_1,   dz = rstd * (dzn - zn * mean(dzn * zn)).
#pragma once

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace megalodon {

struct QkNormRope {
  DType dtype;              // of z, q, k and their gradients
  const void* z;            // [tokens, H, S]
  const void* gamma;        // [2, H, S] stat
  const void* beta;         // [2, H, S] stat
  const int64_t* position;  // [sequences], nullptr: 0
  Sequences sequences;
  int64_t H, S, C;
  double rope_base;
  void* workspace;  // on the CPU double: what turns tokens, [3 + 2 kTurn, pairs], then of each part [6, pairs]
  Parts parts;      // of the tokens
  int64_t pairs;    // S / 2, rounded up to whole vectors

  static constexpr int64_t kTurn = 8;  // tokens whose angles the CPU makes from those of the first

  // By the sizes. On the GPU a part of backward is what the blocks of the H heads work on: enough of them to fill it.
  void divide(bool on_cuda = false) {
    parts =
        on_cuda ? Parts::of(sequences.tokens(), 16, std::max<int64_t>(1, 1024 / H)) : Parts::of(sequences.tokens(), 64);
    pairs = round_up(S / 2, 16);
  }

  // In the workspace: the rows of `pairs` doubles before those of a part; parts.parts for all there are.
  static int64_t rows_before(int64_t part) { return 3 + 2 * kTurn + 6 * part; }
  double* scratch(int64_t part) const { return static_cast<double*>(workspace) + rows_before(part) * pairs; }
};

// Of a token its sequence, and its place in the chunk; for tokens that are asked for in ascending order.
struct QkNormRopePlaces {
  int64_t sequence = -1;
  int64_t end = 0;  // of the sequence

  // Whether the token is beyond the sequence of the one before.
  MEGALODON_HOST_DEVICE bool is_beyond(int64_t token) const { return token >= end; }
  // Goes on to the token's sequence. Packed, there may be thousands: they are walked through, not searched again.
  MEGALODON_HOST_DEVICE int64_t enter(const QkNormRope& args, int64_t token) {
    const Sequences& all = args.sequences;
    if (sequence < 0 || !all.packed) {
      sequence = all.of_token(token);
      end = all.end(sequence);
    }
    while (end <= token && sequence + 1 < all.count) end = all.end(++sequence);
    const uint64_t start = args.position == nullptr ? 0 : args.position[sequence];
    return static_cast<int64_t>((start + (token - all.begin(sequence))) % static_cast<uint64_t>(args.C));
  }
};

struct QkNormRopeForward : QkNormRope {
  void* q;     // [tokens, H, S]
  void* k;     // [tokens, H, S]
  void* rstd;  // [tokens, H] stat
  double eps;

  int64_t workspace_bytes(bool on_cuda) const { return on_cuda ? 0 : rows_before(parts.parts) * pairs * 8; }
};

struct QkNormRopeBackward : QkNormRope {
  static constexpr int64_t kMostRows = 8;  // heads that the CPU works on together

  const void* dq;    // [tokens, H, S]
  const void* dk;    // [tokens, H, S]
  const void* rstd;  // [tokens, H] stat
  void* dz;          // [tokens, H, S]
  void* dgamma;      // [2, H, S] stat
  void* dbeta;       // [2, H, S] stat
  // The workspace goes on with stat: [parts, 4, H, S] sums of dgamma and dbeta, and dzn of a part's rows, [parts,
  // kMostRows, 2 pairs]. On the GPU it is stat: [parts, 2, H, S] sums of dgamma, then of dbeta.
};

static inline Tensor check_qk_norm_rope_inputs(Checker& c, const DLTensor* z_in, const DLTensor* gamma_in,
                                               const DLTensor* beta_in, int64_t num_heads, int64_t chunk_size,
                                               double rope_base, const DLTensor* position_in, double eps,
                                               const DLTensor* cu_seqlens, QkNormRope& args) {
  const Tensor z = c.activation("z", z_in, {any("B"), any("L"), any("D")});
  const Dim D = z.dim(2, "D");
  const DType stat = stat_dtype(z.dtype);
  const Tensor gamma = c.tensor("gamma", gamma_in, stat, {Dim{"2", 2}, D});
  const Tensor beta = c.tensor("beta", beta_in, stat, {Dim{"2", 2}, D});
  c.at_least("num_heads", num_heads, 1);
  c.require(D.size % num_heads == 0 && D.size / num_heads % 2 == 0, "z",
            "[B, L, H * S] with S even and H = " + std::to_string(num_heads) + " (num_heads)",
            "H * S = " + std::to_string(D.size));
  c.at_least("chunk_size", chunk_size, 1);
  c.positive("rope_base", rope_base);
  args.sequences = c.sequences(z, cu_seqlens);
  const Tensor position = c.optional("position", position_in, DType::kInt64, {Checker::rows_of(z, args.sequences)});
  c.positive("eps", eps, stat);
  args.dtype = z.dtype;
  args.z = z.data;
  args.gamma = gamma.data;
  args.beta = beta.data;
  args.position = static_cast<const int64_t*>(position.data);
  args.H = num_heads;
  args.S = D.size / num_heads;
  args.C = chunk_size;
  args.rope_base = rope_base;
  args.divide(c.on_cuda());
  return z;
}

static inline QkNormRopeForward check_qk_norm_rope(Checker& c, const DLTensor* z_in, const DLTensor* gamma,
                                                   const DLTensor* beta, int64_t num_heads, int64_t chunk_size,
                                                   double rope_base, const DLTensor* position, double eps,
                                                   const DLTensor* cu_seqlens, Outputs&& out) {
  QkNormRopeForward args{};
  const Tensor z = check_qk_norm_rope_inputs(c, z_in, gamma, beta, num_heads, chunk_size, rope_base, position, eps,
                                             cu_seqlens, args);
  const int64_t B = z.shape[0], L = z.shape[1];
  args.q = out.next(c, "q", z.dtype, {B, L, args.H, args.S});
  args.k = out.next(c, "k", z.dtype, {B, L, args.H, args.S});
  args.rstd = out.next(c, "rstd", stat_dtype(z.dtype), {B, L, args.H});
  args.workspace = out.workspace(c, args.workspace_bytes(c.on_cuda()));
  args.eps = eps;
  return args;
}

static inline QkNormRopeBackward check_qk_norm_rope_backward(Checker& c, const DLTensor* dq_in, const DLTensor* dk_in,
                                                             const DLTensor* z_in, const DLTensor* gamma,
                                                             const DLTensor* beta, const DLTensor* rstd_in,
                                                             int64_t num_heads, int64_t chunk_size, double rope_base,
                                                             const DLTensor* position, double eps,
                                                             const DLTensor* cu_seqlens, Outputs&& out) {
  QkNormRopeBackward args{};
  const Tensor z = check_qk_norm_rope_inputs(c, z_in, gamma, beta, num_heads, chunk_size, rope_base, position, eps,
                                             cu_seqlens, args);
  const DType stat = stat_dtype(z.dtype);
  const Dim B = z.dim(0, "B"), L = z.dim(1, "L"), H{"H", args.H}, S{"S", args.S};
  args.dq = c.tensor("dq", dq_in, z.dtype, {B, L, H, S}).data;
  args.dk = c.tensor("dk", dk_in, z.dtype, {B, L, H, S}).data;
  args.rstd = c.tensor("rstd", rstd_in, stat, {B, L, H}).data;
  args.dz = out.like(c, "dz", z);
  args.dgamma = out.next(c, "dgamma", stat, {2, args.H * args.S});
  args.dbeta = out.next(c, "dbeta", stat, {2, args.H * args.S});
  const int64_t sums = args.parts.parts * 4 * args.H * args.S * size_of(stat);
  const int64_t dzn = args.parts.parts * QkNormRopeBackward::kMostRows * 2 * args.pairs * size_of(stat);
  const int64_t rows = args.rows_before(args.parts.parts) * args.pairs * 8 + dzn;
  args.workspace = out.workspace(c, c.on_cuda() ? sums : sums + rows);
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(qk_norm_rope_forward, QkNormRopeForward)
MEGALODON_KERNEL_BF16(qk_norm_rope_backward, QkNormRopeBackward)

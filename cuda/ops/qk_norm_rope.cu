// qk_norm_rope on the GPU. Not yet run on a GPU.
//
// Computes  queries and keys from the shared z, and the gradients (ops/qk_norm_rope.h); arXiv 2404.08801.
// Layout    z, q, k (tokens, H, S) and their gradients; gamma, beta (2, H, S); rstd (tokens, H); all compact; a token
//           is of a row or of a packed segment.
// Mapping   a block belongs to one head and a part of the tokens. A row, the S components of a token, belongs to 1 to
//           256 threads, V components each; up to 32 of them share a warp, and a block of four warps walks over several
//           rows side by side. gamma, beta, the angles' steps, and in backward the sums of dgamma and dbeta stay in
//           registers over all rows of a thread.
// Traffic   forward 3, backward 4 elements moved per element of z, about 25 and 35 operations, of which the angles,
//           made anew by every head, are half: memory-bound.
// Numerics  angles in 64-bit fixed point, reduced exactly (core/turns.cuh); everything else in float (double for
//           float64). dgamma, dbeta: one partial sum per part, added in order.
// Limits    none. Rows that are no multiple of V components, not aligned, or longer than 256 V go element by element
//           (V = 2), and of those beyond 512 components the rest is read, and its angles' steps are made, again for
//           every token.
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "core/turns.cuh"
#include "ops/qk_norm_rope.h"

namespace megalodon::cuda {
namespace {

constexpr int kWarps = 4;         // of a block whose rows do not exceed a warp; as many as there are sums
constexpr int kMaxThreads = 256;  // of a row

// Components per thread: two 16-byte accesses of float, one of the 16-bit types. The other choice, kNarrow, fits every
// row: it is read element by element, and there may be more of it than the threads hold in registers.
template <class T>
constexpr int kWide = sizeof(T) == 8 ? 4 : 8;
constexpr int kNarrow = 2;

// Blocks that a multiprocessor holds at once in backward, at least: with float, the registers of two.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

template <int V, class T>
DEVICE Pack<T, V> read(const T* from) {
  if constexpr (V > kNarrow) return load<V>(from);
  return {from[0], from[1]};
}

template <int V, class T>
DEVICE void write(T* to, const Pack<T, V>& pack) {
  if constexpr (V > kNarrow) return store(to, pack);
  to[0] = pack.v[0];
  to[1] = pack.v[1];
}

// Which rows a thread works on, and with which others.
struct Rows {
  int threads;    // of a row
  int lane;       // the thread among them
  int row, rows;  // the row among those side by side in the block
  int64_t h;      // the head
  int64_t part;   // of the tokens

  DEVICE static Rows of(const QkNormRope& args, int threads) {
    const int thread = static_cast<int>(threadIdx.x);
    return {threads,
            thread % threads,
            thread / threads,
            static_cast<int>(blockDim.x) / threads,
            blockIdx.x % args.H,
            blockIdx.x / args.H};
  }

  // The sum over the threads of a row, known to all of them.
  template <class A>
  DEVICE A sum(A value) const {
    if (threads > 32) return row_sum(value);
    for (int bits = threads / 2; bits > 0; bits /= 2) value += shuffle_xor(value, bits);
    return value;
  }
};

// The places in their chunks of every `step`-th token.
class Places {
 public:
  DEVICE Places(const QkNormRope& args, int64_t token, int step) : args_(args), step_(step) { enter(token); }
  DEVICE uint64_t place() const { return static_cast<uint64_t>(place_); }
  DEVICE void advance(int64_t token) {  // to the token, a step on
    if (places_.is_beyond(token)) return enter(token);
    place_ += step_;
    if (place_ >= args_.C) place_ %= args_.C;
  }

 private:
  DEVICE void enter(int64_t token) {
    if (token < args_.parts.count) place_ = places_.enter(args_, token);
  }
  const QkNormRope& args_;
  const int step_;
  QkNormRopePlaces places_;
  int64_t place_ = 0;
};

// What belongs to V components of a head and not to a token.
template <class A, int V>
struct Columns {
  Pack<A, V> gamma_q, gamma_k;
  uint64_t steps[V / 2];  // a pair's angle per place, in turns

  DEVICE static Columns of(const QkNormRope& args, double rate, int64_t h, int64_t i) {
    const A* gamma = static_cast<const A*>(args.gamma) + h * args.S + i;
    Columns columns;
    columns.gamma_q = read<V>(gamma);
    columns.gamma_k = read<V>(gamma + args.H * args.S);
    UNROLL
    for (int p = 0; p < V / 2; ++p) columns.steps[p] = turns_of(exp(static_cast<double>(i / 2 + p) * rate));
    return columns;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads)
    qk_norm_rope_forward_kernel(QkNormRopeForward args, int threads, double rate) {
  using A = stat_t<T>;
  const Rows rows = Rows::of(args, threads);
  const int64_t S = args.S, D = args.H * S, first = static_cast<int64_t>(rows.lane) * V;
  const int64_t rest = V > kNarrow ? S : first + threads * V;  // from there on beyond the registers
  const A* beta = static_cast<const A*>(args.beta) + rows.h * S;
  const A norm = A(1) / sqrt(static_cast<A>(S));
  Columns<A, V> held = {};
  Pack<A, V> beta_q = {}, beta_k = {};
  if (first < S) {
    held = Columns<A, V>::of(args, rate, rows.h, first);
    beta_q = read<V>(beta + first);
    beta_k = read<V>(beta + D + first);
  }
  const int64_t end = args.parts.end(rows.part);
  int64_t token = args.parts.begin(rows.part) + rows.row;
  Places places(args, token, rows.rows);
  const auto fetch = [&](int64_t row) {
    Pack<T, V> pack = {};
    if (row < end && first < S) pack = read<V>(static_cast<const T*>(args.z) + row * D + rows.h * S + first);
    return pack;
  };
  Pack<T, V> next = fetch(token);
  // All threads of the block turn equally often, for the sums.
  for (int64_t base = token - rows.row; base < end; base += rows.rows) {
    const int64_t at = token * D + rows.h * S;
    const T* z = static_cast<const T*>(args.z) + at;
    const Pack<T, V> zs = next;
    next = fetch(token + rows.rows);  // while this row is worked on
    A sum = 0;
    const auto add = [&](const Pack<T, V>& pack) {
      UNROLL
      for (int j = 0; j < V; ++j) sum += widen(pack.v[j]) * widen(pack.v[j]);
    };
    add(zs);
    if (token < end) {
      for (int64_t i = rest; V == kNarrow && i < S; i += threads * V) add(read<V>(z + i));
    }
    const A rstd = A(1) / sqrt(rows.sum(sum) / static_cast<A>(S) + static_cast<A>(args.eps));
    const A scale = rstd * norm;
    const auto finish = [&](const Pack<T, V>& pack, int64_t i, const Columns<A, V>& columns, const Pack<A, V>& bq,
                            const Pack<A, V>& bk) {
      Pack<T, V> q, k;
      UNROLL
      for (int p = 0; p < V / 2; ++p) {
        A sine, cosine;
        sin_cos_turns(columns.steps[p] * places.place(), sine, cosine);
        const A z0 = widen(pack.v[2 * p]) * scale, z1 = widen(pack.v[2 * p + 1]) * scale;
        const A q0 = z0 * columns.gamma_q.v[2 * p] + z0 + bq.v[2 * p];
        const A q1 = z1 * columns.gamma_q.v[2 * p + 1] + z1 + bq.v[2 * p + 1];
        const A k0 = z0 * columns.gamma_k.v[2 * p] + z0 + bk.v[2 * p];
        const A k1 = z1 * columns.gamma_k.v[2 * p + 1] + z1 + bk.v[2 * p + 1];
        q.v[2 * p] = narrow<T>(q0 * cosine - q1 * sine);
        q.v[2 * p + 1] = narrow<T>(q1 * cosine + q0 * sine);
        k.v[2 * p] = narrow<T>(k0 * cosine - k1 * sine);
        k.v[2 * p + 1] = narrow<T>(k1 * cosine + k0 * sine);
      }
      write(static_cast<T*>(args.q) + at + i, q);
      write(static_cast<T*>(args.k) + at + i, k);
    };
    if (token < end) {
      if (rows.lane == 0) static_cast<A*>(args.rstd)[token * args.H + rows.h] = rstd;
      if (first < S) finish(zs, first, held, beta_q, beta_k);
      for (int64_t i = rest; V == kNarrow && i < S; i += threads * V) {
        finish(read<V>(z + i), i, Columns<A, V>::of(args, rate, rows.h, i), read<V>(beta + i), read<V>(beta + D + i));
      }
    }
    token += rows.rows;
    places.advance(token);
  }
}

// dgamma and dbeta of V components: of q's gamma, of k's, of q's beta, of k's.
template <class A, int V>
struct Sums {
  Pack<A, V> v[4];
};

// One thread's share of one row: adds to the sums, and returns dzn.
template <class T, int V>
DEVICE Pack<stat_t<T>, V> turn_back(const Pack<T, V>& z, const Pack<T, V>& dq, const Pack<T, V>& dk, stat_t<T> rstd,
                                    stat_t<T> norm, uint64_t place, const Columns<stat_t<T>, V>& columns,
                                    Sums<stat_t<T>, V>& sums) {
  using A = stat_t<T>;
  Pack<A, V> dzn;
  UNROLL
  for (int p = 0; p < V / 2; ++p) {
    A sine, cosine;
    sin_cos_turns(columns.steps[p] * place, sine, cosine);
    const A q[2] = {widen(dq.v[2 * p]), widen(dq.v[2 * p + 1])};
    const A k[2] = {widen(dk.v[2 * p]), widen(dk.v[2 * p + 1])};
    const A uq[2] = {q[0] * cosine + q[1] * sine, q[1] * cosine - q[0] * sine};
    const A uk[2] = {k[0] * cosine + k[1] * sine, k[1] * cosine - k[0] * sine};
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * p + i;
      const A scaled = widen(z.v[j]) * rstd * norm;
      sums.v[0].v[j] += uq[i] * scaled;
      sums.v[1].v[j] += uk[i] * scaled;
      sums.v[2].v[j] += uq[i];
      sums.v[3].v[j] += uk[i];
      dzn.v[j] = ((uq[i] * columns.gamma_q.v[j] + uq[i]) + (uk[i] * columns.gamma_k.v[j] + uk[i])) * norm;
    }
  }
  return dzn;
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>)
    qk_norm_rope_backward_kernel(QkNormRopeBackward args, int threads, double rate) {
  using A = stat_t<T>;
  const Rows rows = Rows::of(args, threads);
  const int64_t S = args.S, D = args.H * S, first = static_cast<int64_t>(rows.lane) * V;
  const int64_t rest = V > kNarrow ? S : first + threads * V;  // from there on beyond the registers
  const A norm = A(1) / sqrt(static_cast<A>(S));
  // The n-th of the four sums of the part, from component i of the head on.
  const auto sum_at = [&](int n, int64_t i) {
    const int64_t row = ((n / 2) * args.parts.parts + rows.part) * 2 + n % 2;
    return static_cast<A*>(args.workspace) + row * D + rows.h * S + i;
  };
  Columns<A, V> held = {};
  Sums<A, V> sums = {};
  if (first < S) held = Columns<A, V>::of(args, rate, rows.h, first);
  for (int64_t i = rest; V == kNarrow && i < S;
       i += threads * V) {  // these sums stay in the workspace; the block has one row
    UNROLL
    for (int n = 0; n < 4; ++n) write(sum_at(n, i), Pack<A, V>{});
  }
  const int64_t end = args.parts.end(rows.part);
  int64_t token = args.parts.begin(rows.part) + rows.row;
  Places places(args, token, rows.rows);
  // All threads of the block turn equally often, for the sums.
  for (int64_t base = token - rows.row; base < end; base += rows.rows) {
    const int64_t at = token * D + rows.h * S;
    const T* z = static_cast<const T*>(args.z) + at;
    const T* dq = static_cast<const T*>(args.dq) + at;
    const T* dk = static_cast<const T*>(args.dk) + at;
    const bool is_held = token < end && first < S;
    const int64_t last = token < end ? S : 0;
    A rstd = 0, dot = 0;
    Pack<T, V> zs = {};
    Pack<A, V> dzn = {};
    const auto add = [&] {
      UNROLL
      for (int j = 0; j < V; ++j) dot += dzn.v[j] * (widen(zs.v[j]) * rstd);
    };
    if (token < end) rstd = static_cast<const A*>(args.rstd)[token * args.H + rows.h];
    for (int64_t i = rest; V == kNarrow && i < last; i += threads * V) {
      Sums<A, V> more;
      UNROLL
      for (int n = 0; n < 4; ++n) more.v[n] = read<V>(sum_at(n, i));
      zs = read<V>(z + i);
      dzn = turn_back(zs, read<V>(dq + i), read<V>(dk + i), rstd, norm, places.place(),
                      Columns<A, V>::of(args, rate, rows.h, i), more);
      add();
      UNROLL
      for (int n = 0; n < 4; ++n) write(sum_at(n, i), more.v[n]);
    }
    if (is_held) {
      zs = read<V>(z + first);
      dzn = turn_back(zs, read<V>(dq + first), read<V>(dk + first), rstd, norm, places.place(), held, sums);
      add();
    }
    const A mean = rows.sum(dot) / static_cast<A>(S);
    const auto finish = [&](int64_t i) {
      Pack<T, V> dz;
      UNROLL
      for (int j = 0; j < V; ++j) dz.v[j] = narrow<T>((dzn.v[j] - widen(zs.v[j]) * rstd * mean) * rstd);
      write(static_cast<T*>(args.dz) + at + i, dz);
    };
    if (is_held) finish(first);
    for (int64_t i = rest; V == kNarrow && i < last; i += threads * V) {
      Sums<A, V> unused = {};
      zs = read<V>(z + i);
      dzn = turn_back(zs, read<V>(dq + i), read<V>(dk + i), rstd, norm, places.place(),
                      Columns<A, V>::of(args, rate, rows.h, i), unused);
      finish(i);
    }
    token += rows.rows;
    places.advance(token);
  }
  if (threads > 32) {  // one row in the block
    UNROLL
    for (int n = 0; n < 4; ++n) {
      if (first < S) write(sum_at(n, first), sums.v[n]);
    }
    return;
  }
  // Rows that share a warp, then the warps, of which each adds and writes one of the four sums.
  SHARED(A, shared, [kWarps][4][V][32]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  UNROLL
  for (int n = 0; n < 4; ++n) {
    UNROLL
    for (int j = 0; j < V; ++j) {
      A value = sums.v[n].v[j];
      for (int bits = threads; bits < 32; bits *= 2) value += shuffle_xor(value, bits);
      shared[warp][n][j][lane] = value;
    }
  }
  sync_block();  // every warp's sums are there
  if (lane >= threads || first >= S) return;
  Pack<A, V> total = {};
  UNROLL
  for (int w = 0; w < kWarps; ++w) {
    UNROLL
    for (int j = 0; j < V; ++j) total.v[j] += shared[w][warp][j][lane];
  }
  write(sum_at(warp, first), total);
}

int threads_of(int64_t S, int V) {
  int threads = 1;
  while (threads < kMaxThreads && static_cast<int64_t>(threads) * V < S) threads *= 2;
  return threads;
}
dim3 block_of(int threads) { return dim3(static_cast<unsigned>(threads > 32 ? threads : kWarps * 32)); }
dim3 grid_of(const QkNormRope& args) { return dim3(static_cast<unsigned>(args.parts.parts * args.H)); }

// A pair's angle per place is exp(rate * pair).
double rate_of(const QkNormRope& args) { return -2.0 / static_cast<double>(args.S) * log(args.rope_base); }

template <class T, int V>
void forward(QkNormRopeForward args, void* stream) {
  const int threads = threads_of(args.S, V);
  const dim3 block = block_of(threads);
  args.parts = Parts::of(args.sequences.tokens(), block.x / threads, std::max<int64_t>(1, 2048 / args.H));
  launch({"qk_norm_rope_forward", grid_of(args), block, 0, stream}, qk_norm_rope_forward_kernel<T, V>, args, threads,
         rate_of(args));
}

template <class T, int V>
void backward(const QkNormRopeBackward& args, void* stream) {
  using A = stat_t<T>;
  const int threads = threads_of(args.S, V);
  launch({"qk_norm_rope_backward", grid_of(args), block_of(threads), 0, stream}, qk_norm_rope_backward_kernel<T, V>,
         args, threads, rate_of(args));
  const int64_t parts = args.parts.parts, n = 2 * args.H * args.S;
  auto* partial = static_cast<A*>(args.workspace);
  add_parts(partial, parts, n, static_cast<A*>(args.dgamma), stream);
  add_parts(partial + parts * n, parts, n, static_cast<A*>(args.dbeta), stream);
}

template <class T, class... Pointers>
bool is_wide(int64_t S, Pointers... pointers) {
  return S % kWide<T> == 0 && S <= kMaxThreads * kWide<T> && can_pack<T>(S, pointers...);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& args, void* stream) {
  if (args.sequences.tokens() == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = is_wide<T>(args.S, args.z, args.gamma, args.beta, args.q, args.k);
    wide ? forward<T, kWide<T>>(args, stream) : forward<T, kNarrow>(args, stream);
  });
}

void qk_norm_rope_backward(const QkNormRopeBackward& args, void* stream) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = is_wide<T>(args.S, args.z, args.gamma, args.dq, args.dk, args.dz, args.workspace);
    wide ? backward<T, kWide<T>>(args, stream) : backward<T, kNarrow>(args, stream);
  });
}

}  // namespace megalodon::cuda

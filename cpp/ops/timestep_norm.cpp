// Computes  timestep norm (arXiv 2404.08801, as the released code has it) and its gradients (ops/timestep_norm.h).
// Layout    x, y, dy, dx (tokens, D); states (sequences, G); step_mean, step_rstd (tokens, G); mask (tokens); all
//           compact. The tokens of a sequence, a row or a segment of a packed one, are adjacent.
// Mapping   a tile is up to 128 groups and 4096 channels of the sequences of one part; tiles are split over the
//           threads, and a tile walks through time alone. Segments may differ in length a thousandfold: so that no
//           thread gets all of a long one, the parts of the same groups come one after another. A step: sums over
//           groups (vectorised over groups, core/groups.h), the recurrence (over groups), then the channels. Backward
//           takes eight unpadded steps at a time, so that it goes up in memory for a while.
// Traffic   forward 2, backward 3 elements moved per element; what a step reads again is in L1 (backward: L2). About 15
//           and 25 instructions per vector: near memory-bound.
// Numerics  a step is measured from the mean of the steps before it, in one pass: mu - M and s come from the means of
//           x - M and (x - M)^2. What cancels in s when mu is far from M is small beside the c1 (mu - M)^2 that V gets
//           with it, so V is as exact as the sums. The first step, where c1 = 0, is measured from its own mean, in a
//           second pass. M, V and their adjoints are carried in double; everything per channel is float (double for
//           float64). y and the gradients take x - M from M rounded: an error of 2^-24 |M| / sqrt(V) in y, like that of
//           x. dweight, dbias: 256 steps are added in float, these sums in double; one partial sum per fixed part of
//           the sequences, added in order, so the result does not depend on the number of threads.
// Limits    none; D = 0 gives NaN statistics. Group sizes that are no power of two and no multiple of the vector length
//           are slower, as every group ends in a partial vector; so are groups smaller than a vector in float64: by up
//           to an order of magnitude for groups of 1 or 2.
#include "ops/timestep_norm.h"

#include <algorithm>
#include <cmath>

#include "core/groups.h"
#include "core/parameter_sums.h"
#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kMaxGroups = TimestepNormTiles::kMaxGroups;

// Fetches what the hardware does not foresee: the next row of a tile, which may be far away, and lines to be written.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Pairs of vectors pay for 16-bit types, and by less address arithmetic for groups of several vectors. Others were 1.2
// times as slow with them (backward, float32, groups of 16).
template <class T, int P>
constexpr bool kPairs = sizeof(T) == 2 || P == 0;

template <class T, int P>
class ForwardTile {
  using A = stat_t<T>;
  static constexpr int W = kLanes<A>;

 public:
  ForwardTile(const TimestepNormForward& args, const TimestepNormItems::Item& item)
      : args_(args), first_(item.first_group) {
    groups_.K = args.K();
    groups_.groups = item.groups;
  }

  void run(int64_t sequence) {
    start(sequence);
    const int64_t end = args_.sequences.end(sequence);
    for (int64_t token = args_.sequences.begin(sequence); token < end; ++token) {
      const int64_t offset = token * args_.D + first_ * groups_.K;
      const T* x = static_cast<const T*>(args_.x) + offset;
      T* y = static_cast<T*>(args_.y) + offset;
      if (args_.padding_mask != nullptr && args_.padding_mask[token]) {
        std::memset(y, 0, groups_.channels() * sizeof(T));
      } else {
        n_ == 0 ? begin(x, y) : measure(x, y);
        advance();
        normalize(x, y);
      }
      std::memcpy(static_cast<A*>(args_.step_mean) + token * args_.G + first_, mean_, groups_.groups * sizeof(A));
      std::memcpy(static_cast<A*>(args_.step_rstd) + token * args_.G + first_, rstd_, groups_.groups * sizeof(A));
    }
    finish(sequence);
  }

 private:
  void start(int64_t sequence) {
    n_ = args_.count == nullptr ? 0 : args_.count[sequence];
    const auto* mean = static_cast<const A*>(args_.mean);
    const auto* var = static_cast<const A*>(args_.var);
    const int64_t offset = sequence * args_.G + first_;
    for (int64_t g = 0; g < groups_.blocks_end(); ++g) {
      const bool given = mean != nullptr && g < groups_.groups;
      M_[g] = given ? mean[offset + g] : 0.0;
      V_[g] = given ? var[offset + g] : 1.0;
      mean_[g] = static_cast<A>(M_[g]);
      rstd_[g] = static_cast<A>(V_[g] + args_.eps);
    }
    invert_rstd();
  }

  // Of V' + eps.
  void invert_rstd() {
    for (int64_t g = 0; g < groups_.blocks_end(); g += W) store(rstd_ + g, A(1) / sqrt(load(rstd_ + g)));
  }

  // The means of x - m and of (x - m)^2 over every group, m being the mean of the steps so far.
  void measure(const T* x, const T* y) {
    const Vec<A> size = splat(static_cast<A>(groups_.K));
    for (int64_t g = 0; g < groups_.groups; g += W) {
      const Vecs<A, 2> sums =
          groups_.template sum<2>(g, [&](auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
            prefetch(y + i);
            const Vec<A> d = first_lanes(load(x + i, n) - spread<A, P>(mean_ + g, j), n);
            return Vecs<A, 2>{d, d * d};
          });
      store(away_ + g, sums.v[0] / size);
      store(square_ + g, sums.v[1] / size);
    }
  }

  // The first step: M and V have no weight, whatever they are. It is measured from its own mean.
  void begin(const T* x, const T* y) {
    std::memset(mean_, 0, sizeof mean_);
    measure(x, y);
    for (int64_t g = 0; g < groups_.blocks_end(); ++g) {
      M_[g] = mean_[g] = away_[g];
      V_[g] = 0;
    }
    measure(x, y);
  }

  void advance() {
    const int64_t end = groups_.blocks_end();
    const double n = static_cast<double>(n_++);
    const double c1 = n / (n + 1.0);
    const double c2 = 1.0 / (n + 1.0);
    for (int64_t g = 0; g < end; g += kLanes<double>) {
      const Vec<double> away = load_doubles(away_ + g);
      const Vec<double> M = load(M_ + g), V = load(V_ + g);
      const Vec<double> d = away + (load_doubles(mean_ + g) - M);  // mu - M
      const Vec<double> s = load_doubles(square_ + g) - away * away;
      const Vec<double> new_M = c2 * d + M;
      const Vec<double> new_V = c2 * ((s < 0.0 ? 0.0 : s) - V + c1 * (d * d)) + V;
      store(M_ + g, new_M);
      store(V_ + g, new_V);
      store_doubles(mean_ + g, new_M);
      store_doubles(rstd_ + g, new_V + args_.eps);
    }
    invert_rstd();
  }

  void normalize(const T* x, T* y) {
    const A* weight = static_cast<const A*>(args_.weight) + first_ * groups_.K;
    const A* bias = static_cast<const A*>(args_.bias) + first_ * groups_.K;
    for (int64_t g = 0; g < groups_.groups; g += W) {
      const auto normed = [&](int64_t j, int64_t i, int64_t n, Vec<A> v) __attribute__((always_inline)) {
        v = (v - spread<A, P>(mean_ + g, j)) * spread<A, P>(rstd_ + g, j);
        return v * load(weight + i, n) + (v + load(bias + i, n));
      };
      groups_.template for_each_pair<kPairs<T, P>>(
          g,
          [&](int64_t j0, int64_t j1, int64_t i) __attribute__((always_inline)) {
            prefetch(x + i + args_.D);
            if (sizeof(T) > 2) prefetch(x + i + W + args_.D);
            const Pair<A> u = load_pair(x + i);
            store_pair(y + i, Pair<A>{{normed(j0, i, W, u.v[0]), normed(j1, i + W, W, u.v[1])}});
          },
          [&](int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
            prefetch(x + i + args_.D);
            store(y + i, normed(j, i, n, load(x + i, n)), n);
          });
    }
  }

  void finish(int64_t sequence) {
    if (first_ == 0) args_.last_count[sequence] = n_;
    auto* mean = static_cast<A*>(args_.last_mean) + sequence * args_.G + first_;
    auto* var = static_cast<A*>(args_.last_var) + sequence * args_.G + first_;
    for (int64_t g = 0; g < groups_.groups; ++g) {
      mean[g] = static_cast<A>(M_[g]);
      var[g] = static_cast<A>(V_[g]);
    }
  }

  const TimestepNormForward& args_;
  const int64_t first_;  // the tile's first group
  Groups<A, P> groups_;
  int64_t n_;
  alignas(64) double M_[kMaxGroups];
  alignas(64) double V_[kMaxGroups];
  alignas(64) A mean_[kMaxGroups + W];  // of the last step that was not padded
  alignas(64) A rstd_[kMaxGroups + W];
  alignas(64) A away_[kMaxGroups];
  alignas(64) A square_[kMaxGroups];
};

template <class T, int P>
class BackwardTile {
  using A = stat_t<T>;
  static constexpr int W = kLanes<A>;
  static constexpr int kSteps = 8;  // taken together, and in memory order: x, dy and dx of them fit in L2
  static constexpr int kFlush = ParameterSums<A>::kRows / kSteps;  // turns

 public:
  BackwardTile(const TimestepNormBackward& args, const ParameterSums<A>& sums, const TimestepNormItems::Item& item)
      : args_(args), sums_(sums), first_(item.first_group) {
    groups_.K = args.K();
    groups_.groups = item.groups;
    for (int64_t begin : {first_channel(), args.D + first_channel()}) sums_.clear(begin, begin + groups_.channels());
    for (int k = 0; k < kSteps; ++k) {  // of groups that do not exist they stay 0
      std::memset(mean_[k], 0, groups_.blocks_end() * sizeof(A));
      std::memset(rstd_[k], 0, groups_.blocks_end() * sizeof(A));
    }
  }

  void run(int64_t sequence) {
    start(sequence);
    for (int64_t end = args_.sequences.end(sequence); end > begin_;) {
      end = gather(end);
      measure();
      advance();
      differentiate();
      if (++turns_ == kFlush) flush();
    }
    if (!args_.sequences.packed) flush();  // segments may be shorter than a flush takes
    finish(sequence);
  }

  void flush() {
    for (int64_t begin : {first_channel(), args_.D + first_channel()}) sums_.flush(begin, begin + groups_.channels());
    turns_ = 0;
  }

 private:
  int64_t first_channel() const { return first_ * groups_.K; }
  bool is_padded(int64_t token) const { return args_.padding_mask != nullptr && args_.padding_mask[token]; }

  void start(int64_t sequence) {
    begin_ = args_.sequences.begin(sequence);
    n_ = args_.count == nullptr ? 0 : args_.count[sequence];
    for (int64_t token = begin_; token < args_.sequences.end(sequence); ++token) n_ += !is_padded(token);
    const auto* dmean = static_cast<const A*>(args_.dmean);
    const auto* dvar = static_cast<const A*>(args_.dvar);
    const int64_t offset = sequence * args_.G + first_;
    for (int64_t g = 0; g < groups_.blocks_end(); ++g) {
      const bool exists = g < groups_.groups;
      aM_[g] = exists && dmean != nullptr ? dmean[offset + g] : 0.0;
      aV_[g] = exists && dvar != nullptr ? dvar[offset + g] : 0.0;
    }
  }

  // Collects the unpadded steps before `end`, up to kSteps, last first; padded ones on the way get dx = 0.
  int64_t gather(int64_t end) {
    const auto* mean = static_cast<const A*>(args_.step_mean);
    const auto* rstd = static_cast<const A*>(args_.step_rstd);
    for (steps_ = 0; end > begin_ && steps_ < kSteps; --end) {
      const int64_t token = end - 1;
      const int64_t offset = token * args_.D + first_channel();
      T* dx = static_cast<T*>(args_.dx) + offset;
      if (is_padded(token)) {
        std::memset(dx, 0, groups_.channels() * sizeof(T));
        continue;
      }
      dy_[steps_] = static_cast<const T*>(args_.dy) + offset;
      x_[steps_] = static_cast<const T*>(args_.x) + offset;
      dx_[steps_] = dx;
      std::memcpy(mean_[steps_], mean + token * args_.G + first_, groups_.groups * sizeof(A));
      std::memcpy(rstd_[steps_], rstd + token * args_.G + first_, groups_.groups * sizeof(A));
      ++steps_;
    }
    return end;
  }

  // The sums over the groups of u, u (x - M') and x - M'.
  void measure() {
    const A* weight = static_cast<const A*>(args_.weight) + first_channel();
    for (int k = steps_ - 1; k >= 0; --k) {
      for (int64_t g = 0; g < groups_.groups; g += W) {
        const A* mean = mean_[k] + g;
        const Vecs<A, 3> sums =
            groups_.template sum<3>(g, [&](auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
              prefetch(dx_[k] + i);
              const Vec<A> dy = load(dy_[k] + i, n);
              const Vec<A> u = dy * load(weight + i, n) + dy;
              const Vec<A> d = first_lanes(load(x_[k] + i, n) - spread<A, P>(mean, j), n);
              return Vecs<A, 3>{u, u * d, d};
            });
        store(shift_[k] + g, sums.v[0]);
        store(slope_[k] + g, sums.v[1]);
        store(drift_[k] + g, sums.v[2]);
      }
    }
  }

  // The adjoints of a step, and of them the two numbers dx needs: dx = r u + slope (x - M') + shift.
  void advance() {
    const int64_t end = groups_.blocks_end();
    const double per_channel = 1.0 / static_cast<double>(groups_.K);
    for (int k = 0; k < steps_; ++k, --n_) {
      const double c2 = 1.0 / static_cast<double>(n_);
      const double c1 = static_cast<double>(n_ - 1) / static_cast<double>(n_);
      const double to_channel = c2 * per_channel;
      const double to_mean = n_ == 1 ? 0.0 : 2.0 * to_channel;  // mu - M' is 0 at the first step, but for rounding
      for (int64_t g = 0; g < end; g += kLanes<double>) {
        const Vec<double> r = load_doubles(rstd_[k] + g);
        const Vec<double> am = load(aM_ + g) - r * load_doubles(shift_[k] + g);
        const Vec<double> av = load(aV_ + g) - 0.5 * (r * r * r) * load_doubles(slope_[k] + g);
        store_doubles(shift_[k] + g, to_channel * am);
        store_doubles(slope_[k] + g, 2.0 * to_channel * av);
        store(aM_ + g, c1 * am - to_mean * load_doubles(drift_[k] + g) * av);
        store(aV_ + g, c1 * av);
      }
    }
  }

  void differentiate() {
    const A* weight = static_cast<const A*>(args_.weight) + first_channel();
    A* dweight = sums_.recent() + first_channel();
    A* dbias = dweight + args_.D;
    const int64_t next = -kSteps * args_.D;
    for (int k = steps_ - 1; k >= 0; --k) {
      const T* dy_row = dy_[k];
      const T* x_row = x_[k];
      T* dx_row = dx_[k];
      for (int64_t g = 0; g < groups_.groups; g += W) {
        // Adds to dweight and dbias, and gives dx.
        const auto dx = [&](int64_t j, int64_t i, int64_t n, Vec<A> dy, Vec<A> x) __attribute__((always_inline)) {
          const Vec<A> d = x - spread<A, P>(mean_[k] + g, j);
          const Vec<A> scaled = dy * spread<A, P>(rstd_[k] + g, j);
          const Vec<A> rest = spread<A, P>(slope_[k] + g, j) * d + spread<A, P>(shift_[k] + g, j);
          const Vec<A> out = scaled * load(weight + i, n) + (scaled + rest);
          store(dweight + i, scaled * d + load(dweight + i, n), n);
          store(dbias + i, dy + load(dbias + i, n), n);
          return out;
        };
        groups_.template for_each_pair<kPairs<T, P>>(
            g,
            [&](int64_t j0, int64_t j1, int64_t i) __attribute__((always_inline)) {
              for (int64_t at = i; at < i + 2 * W; at += 64 / sizeof(T)) {
                prefetch(dy_row + at + next);
                prefetch(x_row + at + next);
              }
              const Pair<A> dy = load_pair(dy_row + i), x = load_pair(x_row + i);
              const Vec<A> first = dx(j0, i, W, dy.v[0], x.v[0]);
              store_pair(dx_row + i, Pair<A>{{first, dx(j1, i + W, W, dy.v[1], x.v[1])}});
            },
            [&](int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
              prefetch(dy_row + i + next);
              prefetch(x_row + i + next);
              store(dx_row + i, dx(j, i, n, load(dy_row + i, n), load(x_row + i, n)), n);
            });
      }
    }
  }

  void finish(int64_t sequence) {
    if (args_.dmean0 == nullptr) return;
    auto* dmean0 = static_cast<A*>(args_.dmean0) + sequence * args_.G + first_;
    auto* dvar0 = static_cast<A*>(args_.dvar0) + sequence * args_.G + first_;
    for (int64_t g = 0; g < groups_.groups; ++g) {
      dmean0[g] = static_cast<A>(aM_[g]);
      dvar0[g] = static_cast<A>(aV_[g]);
    }
  }

  const TimestepNormBackward& args_;
  ParameterSums<A> sums_;
  const int64_t first_;  // the tile's first group
  Groups<A, P> groups_;
  int64_t begin_;  // the sequence's first token
  int64_t n_;      // after the step
  int turns_ = 0;  // since the last flush
  int steps_;
  const T* dy_[kSteps];
  const T* x_[kSteps];
  T* dx_[kSteps];
  alignas(64) double aM_[kMaxGroups];
  alignas(64) double aV_[kMaxGroups];
  alignas(64) A mean_[kSteps][kMaxGroups + W];
  alignas(64) A rstd_[kSteps][kMaxGroups + W];
  alignas(64) A shift_[kSteps][kMaxGroups + W];
  alignas(64) A slope_[kSteps][kMaxGroups + W];
  alignas(64) A drift_[kSteps][kMaxGroups];
};

// Rows are equal work, and each thread is given its share; parts of segments are not.
template <class Body>
void for_items(const TimestepNormItems& items, int64_t grain, const Body& body) {
  if (items.sequences.packed) return parallel_take(items.count(), grain, body);
  parallel_for(items.count(), grain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

template <class T, int P>
void forward(const TimestepNormForward& args) {
  const TimestepNormItems items = args.items();
  const int64_t elements = args.sequences.tokens() / items.parts * items.narrow.groups * args.K();
  for_items(items, grain_of_rows(elements), [&](int64_t begin, int64_t end) {
    items.for_each(begin, end, args.G, args.K(), [&](const TimestepNormItems::Item& item) {
      ForwardTile<T, P> tile(args, item);
      for (int64_t sequence = item.begin; sequence < item.end; ++sequence) tile.run(sequence);
    });
  });
}

template <class T, int P>
void backward(const TimestepNormBackward& args) {
  using A = stat_t<T>;
  const TimestepNormItems items = args.items();
  const int64_t parts = items.parts;
  for_items(items, 1, [&](int64_t begin, int64_t end) {
    items.for_each(begin, end, args.G, args.K(), [&](const TimestepNormItems::Item& item) {
      BackwardTile<T, P> tile(args, ParameterSums<A>(args.workspace, parts, 2 * args.D, item.part), item);
      for (int64_t sequence = item.begin; sequence < item.end; ++sequence) tile.run(sequence);
      tile.flush();
    });
  });
  const int64_t D = args.D;
  ParameterSums<A>::add_up(args.workspace, parts, 2 * D, 0, D, static_cast<A*>(args.dweight));
  ParameterSums<A>::add_up(args.workspace, parts, 2 * D, D, D, static_cast<A*>(args.dbias));
}

}  // namespace

void timestep_norm_forward(const TimestepNormForward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_group_size<stat_t<T>>(args.K(), [&](auto size) { forward<T, decltype(size)::value>(args); });
  });
}

void timestep_norm_backward(const TimestepNormBackward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_group_size<stat_t<T>>(args.K(), [&](auto size) { backward<T, decltype(size)::value>(args); });
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_timestep_norm_forward_outputs(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                                       int64_t num_groups, double eps, const DLTensor* count,
                                                       const DLTensor* mean, const DLTensor* var,
                                                       const DLTensor* padding_mask, const DLTensor* cu_seqlens,
                                                       megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("timestep_norm");
    check_timestep_norm(c, x, weight, bias, num_groups, eps, count, mean, var, padding_mask, cu_seqlens,
                        Outputs(outputs));
  });
}

extern "C" int megalodon_timestep_norm_forward(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                               int64_t num_groups, double eps, const DLTensor* count,
                                               const DLTensor* mean, const DLTensor* var, const DLTensor* padding_mask,
                                               const DLTensor* cu_seqlens, DLTensor* y, DLTensor* last_count,
                                               DLTensor* last_mean, DLTensor* last_var, DLTensor* step_mean,
                                               DLTensor* step_rstd, DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("timestep_norm");
    const TimestepNormForward args =
        check_timestep_norm(c, x, weight, bias, num_groups, eps, count, mean, var, padding_mask, cu_seqlens,
                            {y, last_count, last_mean, last_var, step_mean, step_rstd, workspace});
    run_on(c, args, cpu::timestep_norm_forward, cuda::timestep_norm_forward, stream);
  });
}

extern "C" int megalodon_timestep_norm_backward_outputs(const DLTensor* dy, const DLTensor* dmean, const DLTensor* dvar,
                                                        const DLTensor* x, const DLTensor* weight,
                                                        const DLTensor* count, const DLTensor* mean,
                                                        const DLTensor* var, const DLTensor* padding_mask,
                                                        const DLTensor* cu_seqlens, const DLTensor* step_mean,
                                                        const DLTensor* step_rstd, int64_t num_groups, double eps,
                                                        megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("timestep_norm_backward");
    check_timestep_norm_backward(c, dy, dmean, dvar, x, weight, count, mean, var, padding_mask, cu_seqlens, step_mean,
                                 step_rstd, num_groups, eps, Outputs(outputs));
  });
}

extern "C" int megalodon_timestep_norm_backward(const DLTensor* dy, const DLTensor* dmean, const DLTensor* dvar,
                                                const DLTensor* x, const DLTensor* weight, const DLTensor* count,
                                                const DLTensor* mean, const DLTensor* var, const DLTensor* padding_mask,
                                                const DLTensor* cu_seqlens, const DLTensor* step_mean,
                                                const DLTensor* step_rstd, int64_t num_groups, double eps, DLTensor* dx,
                                                DLTensor* dweight, DLTensor* dbias, DLTensor* dmean0, DLTensor* dvar0,
                                                DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("timestep_norm_backward");
    const TimestepNormBackward args = check_timestep_norm_backward(
        c, dy, dmean, dvar, x, weight, count, mean, var, padding_mask, cu_seqlens, step_mean, step_rstd, num_groups,
        eps, {dx, dweight, dbias, dmean0, dvar0, workspace});
    run_on(c, args, cpu::timestep_norm_backward, cuda::timestep_norm_backward, stream);
  });
}
#endif

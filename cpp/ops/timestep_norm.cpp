// Computes  timestep norm (arXiv 2404.08801, as the released code has it) and its gradients (ops/timestep_norm.h).
// Layout    x, y, dy, dx (tokens, D); states (sequences, G); step_mean, step_rstd (tokens, G); mask (tokens); all
//           compact. The tokens of a sequence, a row or a segment of a packed one, are adjacent.
// Mapping   a tile is up to 128 groups and 4096 channels of the sequences of one part; tiles are split over the
//           threads, and a tile walks through time alone. Segments may differ in length a thousandfold: so that no
//           thread gets all of a long one, the parts of the same groups come one after another. A step: sums over
//           groups (vectorised over groups, core/groups.h), the recurrence (over groups), then the channels, and these
//           for the unpadded steps of a turn, what is per channel staying in registers. A turn of backward is eight
//           steps, so that it goes up in memory for a while.
// Traffic   forward 2, backward 3 elements moved per element; what a turn reads again is in L1 (backward: L2). Outputs
//           of 8 MiB and more go past the caches. In L2 a step of 32 groups of 16 floats takes 410 and 790 cycles of
//           AMD Zen 4; what is larger waits for memory.
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
#include "core/past.h"
#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kMaxGroups = TimestepNormTiles::kMaxGroups;

// Fetches what the hardware does not foresee: the steps before, on the way back through time.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// x minus the means of a block, as vector j of the block; 0 from lane n on.
template <int P, class V, class T, class J>
__attribute__((always_inline)) inline V difference(const T* x, const stat_t<T>* means, J j, int64_t n) {
  const V d = load_as<V>(x, n) - spread<stat_t<T>, P, V>(means, j);
  if constexpr (std::is_same_v<V, Vec<stat_t<T>>>) return first_lanes(d, n);
  return d;
}

// Whether a tile's outputs, from `channel` on, go past the caches: from 8 MiB on, with what reads them next (AMD Zen 4,
// November 2026). Runs of vectors start where a group does, or where W groups do.
template <class T, int P>
bool leaves_caches(const Sequences& sequences, int64_t D, int64_t K, const void* out, int64_t channel) {
  const T* first = static_cast<const T*>(out) + channel;
  return are_lines(sequences.tokens() * D, P == 0 ? K : D, first, int64_t{8} << 20);
}

template <class T, int P>
class ForwardTile {
  using A = stat_t<T>;
  static constexpr int W = kLanes<A>;
  static constexpr int kHalves = W / kLanes<double>;
  static constexpr int kSteps = sizeof(T) == 2 ? 4 : 2;  // of a turn; floats: short turns of reads and writes

 public:
  ForwardTile(const TimestepNormForward& args, const TimestepNormItems::Item& item)
      : args_(args),
        first_(item.first_group),
        past_(leaves_caches<T, P>(args.sequences, args.D, args.K(), args.y, first_ * args.K())),
        per_channel_(A(1) / static_cast<A>(args.K())) {
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
        normalize();
        std::memset(y, 0, groups_.channels() * sizeof(T));
        for (int64_t g = 0; g < groups_.groups; g += W) keep(token, g, load(mean_ + g), load(rstd_ + g));
        continue;
      }
      if (n_ == 0) begin(x);
      step(x);
      tokens_[steps_] = token;
      x_[steps_] = x;
      y_[steps_] = y;
      if (++steps_ == kSteps) normalize();
    }
    normalize();
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
    for (int64_t g = 0; g < groups_.blocks_end(); g += W) store(rstd_ + g, A(1) / sqrt(load(rstd_ + g)));
  }

  // Before the first step M and V have no weight, whatever they are: it is measured from its own mean.
  void begin(const T* x) {
    std::memset(mean_, 0, sizeof mean_);
    for (int64_t g = 0; g < groups_.groups; g += W) {
      Doubles<A> mean = to_doubles(measure(x, g).v[0]);
      for (int h = 0; h < kHalves; ++h) {
        mean.v[h] = mean.v[h] / static_cast<double>(groups_.K);
        store(M_ + g + h * kLanes<double>, mean.v[h]);
        store(V_ + g + h * kLanes<double>, Vec<double>{});
      }
      store(mean_ + g, from_doubles(mean));
    }
  }

  // The mean and the variance of a step, whose outputs are to come.
  void step(const T* x) {
    const double n = static_cast<double>(n_++);
    const double c1 = n / (n + 1.0), c2 = 1.0 / (n + 1.0);
    for (int64_t g = 0; g < groups_.groups; g += W) advance(g, measure(x, g), c1, c2);
  }

  // The sums of x - m and of (x - m)^2 over the groups of a block, m being the mean of the steps so far.
  __attribute__((always_inline)) Vecs<A, 2> measure(const T* x, int64_t g) const {
    return groups_.template sum<2>(g, [&](auto v, auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
      using V = decltype(v);
      const V d = difference<P, V>(x + i, mean_ + g, j, n);
      return Sums<V, 2>{{d, d * d}};
    });
  }

  __attribute__((always_inline)) void advance(int64_t g, const Vecs<A, 2>& sums, double c1, double c2) {
    const Vec<A> mu = sums.v[0] * per_channel_;  // from the mean of before
    const Vec<A> s = maximum(Vec<A>{}, sums.v[1] * per_channel_ - mu * mu);
    const Doubles<A> away = to_doubles(mu), own = to_doubles(s), mean = to_doubles(load(mean_ + g));
    Doubles<A> new_M, new_V;
    for (int h = 0; h < kHalves; ++h) {
      double *M = M_ + g + h * kLanes<double>, *V = V_ + g + h * kLanes<double>;
      const Vec<double> d = away.v[h] + (mean.v[h] - load(M));  // mu - M
      new_M.v[h] = c2 * d + load(M);
      new_V.v[h] = c2 * (c1 * (d * d) + (own.v[h] - load(V))) + load(V);
      store(M, new_M.v[h]);
      store(V, new_V.v[h]);
    }
    store(mean_ + g, from_doubles(new_M));
    store(means_[steps_] + g, from_doubles(new_M));
    store(rstds_[steps_] + g, from_doubles(new_V));
  }

  void keep(int64_t token, int64_t g, Vec<A> mean, Vec<A> rstd) {
    const int64_t at = token * args_.G + first_ + g;
    store(static_cast<A*>(args_.step_mean) + at, mean, groups_.groups - g);
    store(static_cast<A*>(args_.step_rstd) + at, rstd, groups_.groups - g);
  }

  // The outputs of the steps that wait for them, a run of vectors at a time.
  void normalize() {
    const A* weights = static_cast<const A*>(args_.weight) + first_ * groups_.K;
    const A* biases = static_cast<const A*>(args_.bias) + first_ * groups_.K;
    for (int64_t g = 0; g < groups_.groups; g += W) {
      for (int k = 0; k < steps_; ++k) {
        const Vec<A> rstd = A(1) / sqrt(load(rstds_[k] + g) + static_cast<A>(args_.eps));
        store(rstds_[k] + g, rstd);
        store(rstd_ + g, rstd);
        keep(tokens_[k], g, load(means_[k] + g), rstd);
      }
      groups_.for_each_run(g, [&](auto count, int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
        Vec<A> weight[count], bias[count];
        for (int v = 0; v < count; ++v) {
          weight[v] = load(weights + i + v * W, n) + A(1);
          bias[v] = load(biases + i + v * W, n);
        }
        for (int k = 0; k < steps_; ++k) {
          const auto normed = [&](int v, Vec<A> x) __attribute__((always_inline)) {
            const int64_t group = j + groups_.step(v);
            x = (x - spread<A, P>(means_[k] + g, group)) * spread<A, P>(rstds_[k] + g, group);
            return x * weight[v] + bias[v];
          };
          const T* x_row = x_[k] + i;
          T* y_row = y_[k] + i;
          if constexpr (count == 1) {
            store(y_row, normed(0, load(x_row, n)), n);
          } else {
            for (int v = 0; v < count; v += 2) {
              const Pair<A> x = load_pair(x_row + v * W);
              put_pair(y_row + v * W, Pair<A>{{normed(v, x.v[0]), normed(v + 1, x.v[1])}}, past_);
            }
          }
        }
      });
    }
    steps_ = 0;
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
  const bool past_;
  const A per_channel_;
  Groups<A, P> groups_;
  int64_t n_;
  int steps_ = 0;  // whose outputs are to come
  int64_t tokens_[kSteps];
  const T* x_[kSteps];
  T* y_[kSteps];
  alignas(64) double M_[kMaxGroups];
  alignas(64) double V_[kMaxGroups];
  alignas(64) A mean_[kMaxGroups + W];  // of the last step that was not padded
  alignas(64) A rstd_[kMaxGroups];
  alignas(64) A means_[kSteps][kMaxGroups + W];
  alignas(64) A rstds_[kSteps][kMaxGroups + W];
};

template <class T, int P>
class BackwardTile {
  using A = stat_t<T>;
  static constexpr int W = kLanes<A>;
  static constexpr int kHalves = W / kLanes<double>;
  static constexpr int kSteps = 8;  // taken together, and in memory order: x, dy and dx of them fit in L2
  static constexpr int kFlush = ParameterSums<A>::kRows / kSteps;  // turns

 public:
  BackwardTile(const TimestepNormBackward& args, const ParameterSums<A>& sums, const TimestepNormItems::Item& item)
      : args_(args),
        sums_(sums),
        first_(item.first_group),
        past_(leaves_caches<T, P>(args.sequences, args.D, args.K(), args.dx, first_channel())) {
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
      for (int64_t g = 0; g < groups_.groups; g += W) advance(g);
      for (int64_t g = 0; g < groups_.groups; g += W) differentiate(g);
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
      for (int64_t g = 0, at = token * args_.G + first_; g < groups_.groups; g += W) {
        store(mean_[steps_] + g, load(mean + at + g, groups_.groups - g));
        store(rstd_[steps_] + g, load(rstd + at + g, groups_.groups - g));
        prefetch(mean + at + g - kSteps * args_.G);
        prefetch(rstd + at + g - kSteps * args_.G);
      }
      const double n = static_cast<double>(n_--);
      c1_[steps_] = (n - 1.0) / n;
      to_channel_[steps_] = static_cast<A>(1.0 / (n * static_cast<double>(groups_.K)));
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
            groups_.template sum<3>(g, [&](auto v, auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
              using V = decltype(v);
              const V dy = load_as<V>(dy_[k] + i, n);
              const V u = dy * load_as<V>(weight + i, n) + dy;
              const V d = difference<P, V>(x_[k] + i, mean, j, n);
              return Sums<V, 3>{{u, u * d, d}};
            });
        store(shift_[k] + g, sums.v[0]);
        store(slope_[k] + g, sums.v[1]);
        store(drift_[k] + g, sums.v[2]);
      }
    }
  }

  // The adjoints of the steps, and of them the two numbers dx needs: dx = r u + slope (x - M') + shift.
  void advance(int64_t g) {
    Vec<double> aM[kHalves], aV[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      aM[h] = load(aM_ + g + h * kLanes<double>);
      aV[h] = load(aV_ + g + h * kLanes<double>);
    }
    for (int k = 0; k < steps_; ++k) {
      const double c1 = c1_[k];
      const A to_channel = to_channel_[k];
      const A to_mean = c1 == 0.0 ? A(0) : 2 * to_channel;  // mu - M' is 0 at the first step, but for rounding
      const Vec<A> r = load(rstd_[k] + g);
      const Doubles<A> to_aM = to_doubles(r * load(shift_[k] + g));
      const Doubles<A> to_aV = to_doubles(A(0.5) * r * (r * r) * load(slope_[k] + g));
      const Doubles<A> drift = to_doubles(to_mean * load(drift_[k] + g));
      Doubles<A> am, av;
      for (int h = 0; h < kHalves; ++h) {
        am.v[h] = aM[h] - to_aM.v[h];
        av.v[h] = aV[h] - to_aV.v[h];
        aM[h] = c1 * am.v[h] - drift.v[h] * av.v[h];
        aV[h] = c1 * av.v[h];
      }
      store(shift_[k] + g, to_channel * from_doubles(am));
      store(slope_[k] + g, 2 * to_channel * from_doubles(av));
    }
    for (int h = 0; h < kHalves; ++h) {
      store(aM_ + g + h * kLanes<double>, aM[h]);
      store(aV_ + g + h * kLanes<double>, aV[h]);
    }
  }

  // A run of vectors at a time, so that the sums of dweight and dbias pass through registers once for all the steps.
  void differentiate(int64_t g) {
    const A* weight = static_cast<const A*>(args_.weight) + first_channel();
    A* dweights = sums_.recent() + first_channel();
    A* dbiases = dweights + args_.D;
    const int64_t next = -kSteps * args_.D;
    groups_.for_each_run(g, [&](auto count, int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
      Vec<A> dweight[count], dbias[count];
      for (int v = 0; v < count; ++v) {
        dweight[v] = load(dweights + i + v * W, n);
        dbias[v] = load(dbiases + i + v * W, n);
      }
      for (int k = steps_ - 1; k >= 0; --k) {
        const T *dy_row = dy_[k] + i, *x_row = x_[k] + i;
        T* dx_row = dx_[k] + i;
        for (int64_t at = 0; at < count * W; at += 64 / sizeof(T)) {
          prefetch(dy_row + at + next);
          prefetch(x_row + at + next);
        }
        // Adds to dweight and dbias, and gives dx.
        const auto dx = [&](int v, Vec<A> dy, Vec<A> x) __attribute__((always_inline)) {
          const int64_t group = j + groups_.step(v);
          const Vec<A> d = x - spread<A, P>(mean_[k] + g, group);
          const Vec<A> scaled = dy * spread<A, P>(rstd_[k] + g, group);
          const Vec<A> rest = spread<A, P>(slope_[k] + g, group) * d + spread<A, P>(shift_[k] + g, group);
          dweight[v] += scaled * d;
          dbias[v] += dy;
          return scaled * load(weight + i + v * W, n) + (scaled + rest);
        };
        if constexpr (count == 1) {
          store(dx_row, dx(0, load(dy_row, n), load(x_row, n)), n);
        } else {
          for (int v = 0; v < count; v += 2) {
            const Pair<A> dy = load_pair(dy_row + v * W), x = load_pair(x_row + v * W);
            const Vec<A> first = dx(v, dy.v[0], x.v[0]);
            put_pair(dx_row + v * W, Pair<A>{{first, dx(v + 1, dy.v[1], x.v[1])}}, past_);
          }
        }
      }
      for (int v = 0; v < count; ++v) {
        store(dweights + i + v * W, dweight[v], n);
        store(dbiases + i + v * W, dbias[v], n);
      }
    });
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
  const bool past_;
  Groups<A, P> groups_;
  int64_t begin_;  // the sequence's first token
  int64_t n_;      // after the step
  int turns_ = 0;  // since the last flush
  int steps_;
  const T* dy_[kSteps];
  const T* x_[kSteps];
  T* dx_[kSteps];
  double c1_[kSteps];
  A to_channel_[kSteps];
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
    finish_puts();
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
    finish_puts();
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

// Computes  timestep norm (arXiv 2404.08801, as the released code has it; ops/timestep_norm.h). Its gradients:
//           timestep_norm_backward.cpp.
// Layout    x, y (tokens, D); states (sequences, G); step_mean, step_rstd (tokens, G); mask (tokens); all compact. The
//           tokens of a sequence, a row or a segment of a packed one, are adjacent.
// Mapping   a tile is up to 128 groups and 4096 channels of the sequences of one part; tiles are split over the
//           threads, and a tile walks through time alone. Segments may differ in length a thousandfold: so that no
//           thread gets all of a long one, the parts of the same groups come one after another. A turn is up to four
//           unpadded steps: their sums over groups (vectorised over groups, core/groups.h), which wait for no other
//           step's, then the recurrence (over groups), then the channels, what is per channel staying in registers.
// Traffic   2 elements moved per element; what a turn reads again is in L1. Outputs of 8 MiB and more go past the
//           caches. In L2 a step of 32 groups of 16 takes 420 cycles of AMD Zen 4, in bf16 390; what is larger waits
//           for memory.
// Numerics  two steps (of 16 bits four) are measured from the mean M of those before them, in one pass: mu - M and s
//           come from the means of x - M and (x - M)^2. What cancels in s when mu is far from M is small beside what V
//           gets with it: c1 times the square of mu - M, and where these steps have moved the mean by m, a third of m^2
//           at least. So V is as exact as the sums. The first step of all, where c1 = 0, is measured from its own mean,
//           in a second pass. M and V are carried in double; everything per channel and the sums of a step are float
//           (double for float64). y takes x - M from M rounded: an error of 2^-24 |M| / sqrt(V), like that of x.
// Limits    none; D = 0 gives NaN statistics. Group sizes that are no power of two and no multiple of the vector length
//           are slower, as every group ends in a partial vector; so are groups smaller than a vector in float64: by up
//           to an order of magnitude for groups of 1 or 2.
#include <cstring>

#include "ops/timestep_norm_tiles.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kMaxGroups = TimestepNormTiles::kMaxGroups;

template <class T, int P>
class ForwardTile {
  using A = stat_t<T>;
  static constexpr int W = kLanes<A>;
  static constexpr int kHalves = W / kLanes<double>;
  static constexpr int kSteps = sizeof(T) == 2 ? 4 : 2;  // that are measured from one mean, and of a turn at most

 public:
  ForwardTile(const TimestepNormForward& args, const TimestepNormItems::Item& item)
      : args_(args),
        first_(item.first_group),
        past_(leaves_caches<T, P>(args.sequences, args.D, args.K(), args.y, first_ * args.K())),
        turn_(turn_of(args, item.groups * args.K())),
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
        std::memset(y, 0, groups_.channels() * sizeof(T));
        if (steps_ > 0) {
          ++tokens_of_[steps_ - 1];
        } else {
          for (int64_t g = 0; g < groups_.groups; g += W) keep(token, 1, g, load(last_ + g), load(rstd_ + g));
        }
        continue;
      }
      if (n_ == 0) begin(x);
      n_of_[steps_] = static_cast<double>(n_++);
      tokens_[steps_] = token;
      tokens_of_[steps_] = 1;
      x_[steps_] = x;
      y_[steps_] = y;
      if (++steps_ == turn_) take_turn();
    }
    take_turn();
    finish(sequence);
  }

 private:
  // Steps of a turn. Floats that wait for memory go best in turns of reads and writes of 4 KB or of much more, and
  // where groups end in partial vectors, row by row: up to 1.6 times as fast (AMD Zen 4, November 2026).
  static int turn_of(const TimestepNormForward& args, int64_t channels) {
    const int64_t row = channels * sizeof(T), page = 4096;
    const bool waits = args.sequences.tokens() * args.D * sizeof(T) >= kLargeBytes;
    return sizeof(T) > 2 && waits && (args.K() % W != 0 || (row > page / 2 && row < 2 * page)) ? 1 : kSteps;
  }

  void start(int64_t sequence) {
    n_ = args_.count == nullptr ? 0 : args_.count[sequence];
    measured_ = 0;
    const auto* mean = static_cast<const A*>(args_.mean);
    const auto* var = static_cast<const A*>(args_.var);
    const int64_t offset = sequence * args_.G + first_;
    for (int64_t g = 0; g < groups_.blocks_end(); ++g) {
      const bool given = mean != nullptr && g < groups_.groups;
      M_[g] = given ? mean[offset + g] : 0.0;
      V_[g] = given ? var[offset + g] : 1.0;
      mean_[g] = last_[g] = static_cast<A>(M_[g]);
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

  // The steps that wait for it, which are measured from a mean of before: none waits for the one before it.
  void take_turn() {
    for (int k = 0; k < steps_; ++k) {
      for (int64_t g = 0; g < groups_.groups; g += W) {
        const Vecs<A, 2> sums = measure(x_[k], g);
        store(means_[k] + g, sums.v[0]);
        store(rstds_[k] + g, sums.v[1]);
      }
    }
    for (int64_t g = 0; g < groups_.groups; g += W) advance(g);
    for (int64_t g = 0; g < groups_.groups; g += W) normalize(g);
    measured_ = (measured_ + steps_) % kSteps;
    steps_ = 0;
  }

  // The sums of x - m and of (x - m)^2 over the groups of a block, m being the mean they are measured from.
  __attribute__((always_inline)) Vecs<A, 2> measure(const T* x, int64_t g) const {
    const auto sums = [&](auto j, int64_t n, auto v) __attribute__((always_inline)) {
      using V = decltype(v);
      const V d = difference<P>(v, mean_ + g, j, n);
      return Sums<V, 2>{{d, d * d}};
    };
    return groups_.template sum<2>(g, sums, x);
  }

  // The means and the variances of the steps, from what was measured.
  void advance(int64_t g) {
    Vec<double> M[kHalves], V[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      M[h] = load(M_ + g + h * kLanes<double>);
      V[h] = load(V_ + g + h * kLanes<double>);
    }
    const Doubles<A> from = to_doubles(load(mean_ + g));
    for (int k = 0; k < steps_; ++k) {
      const double c2 = 1.0 / (n_of_[k] + 1.0), c1 = n_of_[k] * c2;
      const Vec<A> mu = load(means_[k] + g) * per_channel_;
      const Vec<A> s = maximum(Vec<A>{}, load(rstds_[k] + g) * per_channel_ - mu * mu);
      const Doubles<A> away = to_doubles(mu), own = to_doubles(s);
      Doubles<A> new_M, new_V;
      for (int h = 0; h < kHalves; ++h) {
        const Vec<double> d = away.v[h] + (from.v[h] - M[h]);  // mu - M
        new_M.v[h] = M[h] = c2 * d + M[h];
        new_V.v[h] = V[h] = c2 * (c1 * (d * d) + (own.v[h] - V[h])) + V[h];
      }
      const Vec<A> mean = from_doubles(new_M);
      for (int h = 0; h < kHalves; ++h) new_V.v[h] += args_.eps;
      const Vec<A> rstd = reciprocal_root(from_doubles(new_V));
      store(means_[k] + g, mean);
      store(rstds_[k] + g, rstd);
      store(last_ + g, mean);
      store(rstd_ + g, rstd);
      if (measured_ + k + 1 == kSteps) store(mean_ + g, mean);
      keep(tokens_[k], tokens_of_[k], g, mean, rstd);
    }
    for (int h = 0; h < kHalves; ++h) {
      store(M_ + g + h * kLanes<double>, M[h]);
      store(V_ + g + h * kLanes<double>, V[h]);
    }
  }

  // 1 / sqrt(v), whose two roundings a step of Newton's takes back; of infinity 0.
  static Vec<A> reciprocal_root(Vec<A> v) {
    const Vec<A> root = A(1) / sqrt(v);
    const Vec<A> off = A(1) - v * root * root;
    return off == off ? off * root * A(0.5) + root : root;
  }

  void keep(int64_t token, int64_t tokens, int64_t g, Vec<A> mean, Vec<A> rstd) {
    for (int64_t at = token * args_.G + first_ + g; tokens > 0; --tokens, at += args_.G) {
      store(static_cast<A*>(args_.step_mean) + at, mean, groups_.groups - g);
      store(static_cast<A*>(args_.step_rstd) + at, rstd, groups_.groups - g);
    }
  }

  // The outputs, a run of vectors at a time.
  void normalize(int64_t g) {
    const A* weights = static_cast<const A*>(args_.weight) + first_ * groups_.K;
    const A* biases = static_cast<const A*>(args_.bias) + first_ * groups_.K;
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
  const int turn_;
  const A per_channel_;
  Groups<A, P> groups_;
  int64_t n_;
  int steps_ = 0;        // that wait for their turn
  int measured_;         // from mean_, before these
  double n_of_[kSteps];  // how many there were before
  int64_t tokens_[kSteps];
  int64_t tokens_of_[kSteps];  // with the padded ones behind it, whose statistics are its own
  const T* x_[kSteps];
  T* y_[kSteps];
  alignas(64) double M_[kMaxGroups];
  alignas(64) double V_[kMaxGroups];
  alignas(64) A mean_[kMaxGroups + W];  // that steps are measured from
  alignas(64) A last_[kMaxGroups];      // of the last step that was not padded
  alignas(64) A rstd_[kMaxGroups];
  alignas(64) A means_[kSteps][kMaxGroups + W];
  alignas(64) A rstds_[kSteps][kMaxGroups + W];
};

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

}  // namespace

void timestep_norm_forward(const TimestepNormForward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_group_size<stat_t<T>>(args.K(), [&](auto size) { forward<T, decltype(size)::value>(args); });
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
    c.not_negative("count", args.count, args.sequences.count);
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
    c.not_negative("count", args.count, args.sequences.count);
    run_on(c, args, cpu::timestep_norm_backward, cuda::timestep_norm_backward, stream);
  });
}
#endif

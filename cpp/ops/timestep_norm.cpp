// Computes  timestep norm (arXiv 2404.08801, as the released code has it) and its gradients (ops/timestep_norm.h).
// Layout    x, y, dy, dx (B, L, D); states (B, G); step_mean, step_rstd (B, L, G); mask (B, L); all compact.
// Mapping   a tile is up to 128 groups, about 512 channels, of one batch row (backward: of the rows of one part of the
//           batch); tiles are split over the threads, and a tile walks through time alone, four unpadded steps at a
//           time: their sums over groups (vectorised over groups, core/groups.h), the recurrence (over groups), then
//           their channels, each vector of parameters being read once for the four.
// Traffic   forward 2, backward 3 elements moved per element; a step is read again from L1. About 15 and 25
//           instructions per vector: memory-bound where a group is 4 channels or more.
// Numerics  a step's variance is taken around the step's own mean. M, V and their adjoints are carried in double;
//           everything per channel is float (double for float64). dweight, dbias: four steps are added in registers,
//           256 in float, all others in double; one partial sum per fixed part of the batch, added in order, so the
//           result does not depend on the number of threads.
// Limits    none; D = 0 gives empty rows with NaN statistics. Group sizes other than 1, 2, 4, 8 and the multiples of
//           the vector length are two to four times slower.
#include "ops/timestep_norm.h"

#include <algorithm>
#include <cmath>

#include "core/groups.h"
#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int kSteps = 4;  // taken together; more would not fit in L1 with dy and dx
constexpr int64_t kMaxGroups = TimestepNormTiles::kMaxGroups;

template <class T, int P>
class ForwardTile {
  using A = stat_t<T>;
  static constexpr int W = kLanes<A>;

 public:
  ForwardTile(const TimestepNormForward& args, int64_t b, int64_t tile)
      : args_(args), b_(b), first_(tile * args.tiles().groups) {
    groups_.K = args.K();
    groups_.groups = std::min(args.tiles().groups, args.G - first_);
  }

  void run() {
    start();
    for (int64_t t = 0; t < args_.L;) {
      const int64_t end = gather(t);
      measure();
      advance();
      normalize();
      record(t, end);
      t = end;
    }
    finish();
  }

 private:
  bool is_padded(int64_t t) const { return args_.padding_mask != nullptr && args_.padding_mask[b_ * args_.L + t]; }

  void start() {
    n_ = args_.count == nullptr ? 0 : args_.count[b_];
    const auto* mean = static_cast<const A*>(args_.mean);
    const auto* var = static_cast<const A*>(args_.var);
    const int64_t offset = b_ * args_.G + first_;
    for (int64_t g = 0; g < groups_.blocks_end(); ++g) {
      const bool given = mean != nullptr && g < groups_.groups;
      M_[g] = given ? mean[offset + g] : 0.0;
      V_[g] = given ? var[offset + g] : 1.0;
      mean_[0][g] = static_cast<A>(M_[g]);
      rstd_[0][g] = A(1) / std::sqrt(static_cast<A>(V_[g] + args_.eps));
    }
  }

  // Collects the next unpadded steps from t on, up to kSteps; padded ones on the way get y = 0. Returns where to go on.
  int64_t gather(int64_t t) {
    for (steps_ = 0; t < args_.L && steps_ < kSteps; ++t) {
      const int64_t offset = (b_ * args_.L + t) * args_.D + first_ * groups_.K;
      T* y = static_cast<T*>(args_.y) + offset;
      if (is_padded(t)) {
        std::memset(y, 0, groups_.channels() * sizeof(T));
        continue;
      }
      x_[steps_] = static_cast<const T*>(args_.x) + offset;
      y_[steps_++] = y;
    }
    return t;
  }

  // mu and s of every group and step, in the places of the mean and the rstd that advance() makes of them.
  void measure() {
    const Vec<A> size = splat(static_cast<A>(groups_.K));
    for (int k = 0; k < steps_; ++k) {
      const T* x = x_[k];
      A* mu = mean_[k + 1];
      for (int64_t g = 0; g < groups_.groups; g += W) {
        const Vecs<A, 1> sums = groups_.template sum<1>(
            g, [&](auto, int64_t i, int64_t n) __attribute__((always_inline)) { return Vecs<A, 1>{load(x + i, n)}; });
        store(mu + g, sums.v[0] / size);
      }
      for (int64_t g = 0; g < groups_.groups; g += W) {
        const Vecs<A, 1> sums = groups_.template sum<1>(
            g, [&](auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
              const Vec<A> d = first_lanes<A>(load(x + i, n) - spread<A, P, decltype(j)::value>(mu + g), n);
              return Vecs<A, 1>{d * d};
            });
        store(rstd_[k + 1] + g, sums.v[0] / size);
      }
    }
  }

  void advance() {
    const int64_t end = groups_.blocks_end();
    for (int k = 1; k <= steps_; ++k, ++n_) {
      const double c2 = 1.0 / (static_cast<double>(n_) + 1.0);
      const double c1 = static_cast<double>(n_) / (static_cast<double>(n_) + 1.0);
      A* __restrict mean = mean_[k];
      A* __restrict rstd = rstd_[k];
      double* __restrict M = M_;
      double* __restrict V = V_;
      for (int64_t g = 0; g < end; ++g) {
        const double mu = mean[g];
        const double d = mu - M[g];
        M[g] = c1 * M[g] + c2 * mu;
        V[g] = c1 * V[g] + c2 * (rstd[g] + c1 * (d * d));
        mean[g] = static_cast<A>(M[g]);
        rstd[g] = static_cast<A>(V[g] + args_.eps);
      }
      for (int64_t g = 0; g < end; g += W) store(rstd + g, A(1) / sqrt(load(rstd + g)));
    }
  }

  void normalize() {
    const A* weight = static_cast<const A*>(args_.weight) + first_ * groups_.K;
    const A* bias = static_cast<const A*>(args_.bias) + first_ * groups_.K;
    for (int64_t g = 0; g < groups_.groups; g += W) {
      groups_.for_each_vector(g, [&](auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        const Vec<A> scale = load(weight + i, n) + A(1);
        const Vec<A> shift = load(bias + i, n);
        for (int k = 0; k < steps_; ++k) {
          const Vec<A> d = load(x_[k] + i, n) - spread<A, P, J>(mean_[k + 1] + g);
          store(y_[k] + i, d * spread<A, P, J>(rstd_[k + 1] + g) * scale + shift, n);
        }
      });
    }
  }

  // Writes the statistics of the steps [t, end), of which steps_ are unpadded, and keeps the last for the next ones.
  void record(int64_t t, int64_t end) {
    auto* mean = static_cast<A*>(args_.step_mean);
    auto* rstd = static_cast<A*>(args_.step_rstd);
    const int64_t bytes = groups_.groups * sizeof(A);
    for (int k = 0; t < end; ++t) {
      k += !is_padded(t);
      const int64_t offset = (b_ * args_.L + t) * args_.G + first_;
      std::memcpy(mean + offset, mean_[k], bytes);
      std::memcpy(rstd + offset, rstd_[k], bytes);
    }
    if (steps_ == 0) return;
    std::memcpy(mean_[0], mean_[steps_], bytes);
    std::memcpy(rstd_[0], rstd_[steps_], bytes);
  }

  void finish() {
    if (first_ == 0) args_.last_count[b_] = n_;
    auto* mean = static_cast<A*>(args_.last_mean) + b_ * args_.G + first_;
    auto* var = static_cast<A*>(args_.last_var) + b_ * args_.G + first_;
    for (int64_t g = 0; g < groups_.groups; ++g) {
      mean[g] = static_cast<A>(M_[g]);
      var[g] = static_cast<A>(V_[g]);
    }
  }

  const TimestepNormForward& args_;
  const int64_t b_;
  const int64_t first_;  // the tile's first group
  Groups<A, P> groups_;
  int64_t n_;
  int steps_;
  const T* x_[kSteps];
  T* y_[kSteps];
  alignas(64) double M_[kMaxGroups];
  alignas(64) double V_[kMaxGroups];
  alignas(64) A mean_[kSteps + 1][kMaxGroups];  // [0]: after the step before
  alignas(64) A rstd_[kSteps + 1][kMaxGroups];
};

// The partial sums of one part of the batch for dweight and dbias.
template <class A>
struct ParameterSums {
  double* total[2];  // [D]: of dweight, of dbias
  A* recent[2];      // [D]: the last steps

  static ParameterSums of(const TimestepNormBackward& args, int64_t part) {
    auto* totals = static_cast<double*>(args.workspace);
    auto* recents = reinterpret_cast<A*>(totals + args.parts().parts * 2 * args.D);
    double* total = totals + part * 2 * args.D;
    A* recent = recents + part * 2 * args.D;
    return {{total, total + args.D}, {recent, recent + args.D}};
  }

  void clear(int64_t begin, int64_t end) {
    for (int which = 0; which < 2; ++which) {
      std::fill(total[which] + begin, total[which] + end, 0.0);
      std::fill(recent[which] + begin, recent[which] + end, A(0));
    }
  }

  void flush(int64_t begin, int64_t end) {
    for (int which = 0; which < 2; ++which) {
      for (int64_t i = begin; i < end; ++i) {
        total[which][i] += recent[which][i];
        recent[which][i] = 0;
      }
    }
  }
};

template <class T, int P>
class BackwardTile {
  using A = stat_t<T>;
  static constexpr int W = kLanes<A>;
  static constexpr int kFlush = 64;  // turns, of kSteps steps each, that are summed in A before they go to double

 public:
  BackwardTile(const TimestepNormBackward& args, const ParameterSums<A>& sums, int64_t tile)
      : args_(args), sums_(sums), first_(tile * args.tiles().groups) {
    groups_.K = args.K();
    groups_.groups = std::min(args.tiles().groups, args.G - first_);
    sums_.clear(first_channel(), first_channel() + groups_.channels());
  }

  void run(int64_t b) {
    b_ = b;
    start();
    int turns = 0;
    for (int64_t t = args_.L; t > 0;) {
      t = gather(t);
      measure();
      advance();
      differentiate();
      if (++turns % kFlush == 0) flush();
    }
    flush();
    finish();
  }

 private:
  int64_t first_channel() const { return first_ * groups_.K; }
  bool is_padded(int64_t t) const { return args_.padding_mask != nullptr && args_.padding_mask[b_ * args_.L + t]; }
  void flush() { sums_.flush(first_channel(), first_channel() + groups_.channels()); }

  void start() {
    n_ = args_.count == nullptr ? 0 : args_.count[b_];
    for (int64_t t = 0; t < args_.L; ++t) n_ += !is_padded(t);
    const auto* dmean = static_cast<const A*>(args_.dmean);
    const auto* dvar = static_cast<const A*>(args_.dvar);
    const int64_t offset = b_ * args_.G + first_;
    for (int64_t g = 0; g < groups_.blocks_end(); ++g) {
      const bool exists = g < groups_.groups;
      aM_[g] = exists && dmean != nullptr ? dmean[offset + g] : 0.0;
      aV_[g] = exists && dvar != nullptr ? dvar[offset + g] : 0.0;
      for (int k = 0; k < kSteps; ++k) mean_[k][g] = rstd_[k][g] = 0;
    }
  }

  // Collects the unpadded steps before t, up to kSteps, last first; padded ones on the way get dx = 0.
  int64_t gather(int64_t t) {
    const auto* mean = static_cast<const A*>(args_.step_mean);
    const auto* rstd = static_cast<const A*>(args_.step_rstd);
    for (steps_ = 0; t > 0 && steps_ < kSteps; --t) {
      const int64_t row = b_ * args_.L + t - 1;
      const int64_t offset = row * args_.D + first_channel();
      T* dx = static_cast<T*>(args_.dx) + offset;
      if (is_padded(t - 1)) {
        std::memset(dx, 0, groups_.channels() * sizeof(T));
        continue;
      }
      dy_[steps_] = static_cast<const T*>(args_.dy) + offset;
      x_[steps_] = static_cast<const T*>(args_.x) + offset;
      dx_[steps_] = dx;
      std::memcpy(mean_[steps_], mean + row * args_.G + first_, groups_.groups * sizeof(A));
      std::memcpy(rstd_[steps_], rstd + row * args_.G + first_, groups_.groups * sizeof(A));
      ++steps_;
    }
    return t;
  }

  // The sums over the groups of u, u (x - M') and x - M'.
  void measure() {
    const A* weight = static_cast<const A*>(args_.weight) + first_channel();
    for (int k = 0; k < steps_; ++k) {
      for (int64_t g = 0; g < groups_.groups; g += W) {
        const A* mean = mean_[k] + g;
        const Vecs<A, 3> sums = groups_.template sum<3>(
            g, [&](auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
              const Vec<A> dy = load(dy_[k] + i, n);
              const Vec<A> u = dy * load(weight + i, n) + dy;
              const Vec<A> d = first_lanes<A>(load(x_[k] + i, n) - spread<A, P, decltype(j)::value>(mean), n);
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
      const A* __restrict rstd = rstd_[k];
      const A* __restrict drift = drift_[k];
      A* __restrict shift = shift_[k];
      A* __restrict slope = slope_[k];
      double* __restrict aM = aM_;
      double* __restrict aV = aV_;
      for (int64_t g = 0; g < end; ++g) {
        const double r = rstd[g];
        const double am = aM[g] - r * shift[g];
        const double av = aV[g] - 0.5 * (r * r * r) * slope[g];
        shift[g] = static_cast<A>(to_channel * am);
        slope[g] = static_cast<A>(2.0 * to_channel * av);
        aM[g] = c1 * am - to_mean * drift[g] * av;
        aV[g] = c1 * av;
      }
    }
  }

  void differentiate() {
    const A* weight = static_cast<const A*>(args_.weight) + first_channel();
    A* dweight = sums_.recent[0] + first_channel();
    A* dbias = sums_.recent[1] + first_channel();
    for (int64_t g = 0; g < groups_.groups; g += W) {
      groups_.for_each_vector(g, [&](auto j, int64_t i, int64_t n) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        const Vec<A> scale = load(weight + i, n) + A(1);
        Vec<A> dw = load(dweight + i, n);
        Vec<A> db = load(dbias + i, n);
        for (int k = 0; k < steps_; ++k) {
          const Vec<A> dy = load(dy_[k] + i, n);
          const Vec<A> d = load(x_[k] + i, n) - spread<A, P, J>(mean_[k] + g);
          const Vec<A> scaled = dy * spread<A, P, J>(rstd_[k] + g);
          dw = scaled * d + dw;
          db += dy;
          const Vec<A> rest = spread<A, P, J>(slope_[k] + g) * d + spread<A, P, J>(shift_[k] + g);
          store(dx_[k] + i, scaled * scale + rest, n);
        }
        store(dweight + i, dw, n);
        store(dbias + i, db, n);
      });
    }
  }

  void finish() {
    if (args_.dmean0 == nullptr) return;
    auto* dmean0 = static_cast<A*>(args_.dmean0) + b_ * args_.G + first_;
    auto* dvar0 = static_cast<A*>(args_.dvar0) + b_ * args_.G + first_;
    for (int64_t g = 0; g < groups_.groups; ++g) {
      dmean0[g] = static_cast<A>(aM_[g]);
      dvar0[g] = static_cast<A>(aV_[g]);
    }
  }

  const TimestepNormBackward& args_;
  ParameterSums<A> sums_;
  const int64_t first_;  // the tile's first group
  Groups<A, P> groups_;
  int64_t b_;
  int64_t n_;  // after the step
  int steps_;
  const T* dy_[kSteps];
  const T* x_[kSteps];
  T* dx_[kSteps];
  alignas(64) double aM_[kMaxGroups];
  alignas(64) double aV_[kMaxGroups];
  alignas(64) A mean_[kSteps][kMaxGroups];
  alignas(64) A rstd_[kSteps][kMaxGroups];
  alignas(64) A shift_[kSteps][kMaxGroups];
  alignas(64) A slope_[kSteps][kMaxGroups];
  alignas(64) A drift_[kSteps][kMaxGroups];
};

template <class T, int P>
void forward(const TimestepNormForward& args) {
  const TimestepNormTiles tiles = args.tiles();
  parallel_for(args.B * tiles.tiles, grain_of_rows(args.L * tiles.groups * args.K()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ForwardTile<T, P>(args, i / tiles.tiles, i % tiles.tiles).run();
  });
}

template <class T, int P>
void backward(const TimestepNormBackward& args) {
  using A = stat_t<T>;
  const Parts parts = args.parts();
  const int64_t tiles = args.tiles().tiles;
  parallel_for(parts.parts * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / tiles;
      BackwardTile<T, P> tile(args, ParameterSums<A>::of(args, part), i % tiles);
      for (int64_t b = parts.begin(part); b < parts.end(part); ++b) tile.run(b);
    }
  });
  A* gradients[2] = {static_cast<A*>(args.dweight), static_cast<A*>(args.dbias)};
  for (int which = 0; which < 2; ++which) {
    for (int64_t i = 0; i < args.D; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts.parts; ++part) sum += ParameterSums<A>::of(args, part).total[which][i];
      gradients[which][i] = static_cast<A>(sum);
    }
  }
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
                                               DLTensor* step_rstd, void* stream) {
  return guarded([&] {
    Checker c("timestep_norm");
    const TimestepNormForward args =
        check_timestep_norm(c, x, weight, bias, num_groups, eps, count, mean, var, padding_mask, cu_seqlens,
                            {y, last_count, last_mean, last_var, step_mean, step_rstd});
    run_on(c, args, cpu::timestep_norm_forward, stream);
  });
}

extern "C" int megalodon_timestep_norm_backward_outputs(
    const DLTensor* dy, const DLTensor* dmean, const DLTensor* dvar, const DLTensor* x, const DLTensor* weight,
    const DLTensor* count, const DLTensor* mean, const DLTensor* var, const DLTensor* padding_mask,
    const DLTensor* cu_seqlens, const DLTensor* step_mean, const DLTensor* step_rstd, int64_t num_groups, double eps,
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
    run_on(c, args, cpu::timestep_norm_backward, stream);
  });
}
#endif

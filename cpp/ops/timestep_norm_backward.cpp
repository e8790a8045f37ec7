// Computes  the gradients of timestep norm (ops/timestep_norm.h).
// Layout    as forward (timestep_norm.cpp); dy, dx (tokens, D).
// Mapping   as forward, from the last step to the first. A turn is eight unpadded steps, so that it goes up in memory
//           for a while: sums over groups of all its steps, then their recurrence, then the channels, a run of vectors
//           at a time with its sums of dweight and dbias in registers.
// Traffic   3 elements moved per element; what a turn reads again is in L2. dx of 8 MiB and more goes past the caches.
//           In L2 a step of 32 groups of 16 floats takes 790 cycles of AMD Zen 4; what is larger waits for memory.
// Numerics  the adjoints of M and V are carried in double; everything per channel, and what a step adds to them, is
//           float (double for float64), with x - M from M rounded as in forward. dweight, dbias: 256 steps are added in
//           float, these sums in double; one partial sum per fixed part of the sequences, added in order, so the result
//           does not depend on the number of threads.
// Limits    as forward.
#include <cstring>

#include "core/parameter_sums.h"
#include "ops/timestep_norm_tiles.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kMaxGroups = TimestepNormTiles::kMaxGroups;

// Fetches what the hardware does not foresee: the steps before, on the way back through time.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

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
    weight_ = static_cast<const A*>(args.weight) + first_channel();
    if constexpr (kArranged) {
      groups_.arrange(weight_, groups_.channels(), arranged_);
      weight_ = arranged_;
    }
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
    for (int k = steps_ - 1; k >= 0; --k) {
      for (int64_t g = 0; g < groups_.groups; g += W) {
        const auto sums = [&](auto j, int64_t n, auto x, auto dy, auto weight) __attribute__((always_inline)) {
          using V = decltype(x);
          const V u = dy * weight + dy;
          const V d = difference<P>(x, mean_[k] + g, j, n);
          return Sums<V, 3>{{u, u * d, d}};
        };
        const Vecs<A, 3> total = groups_.template sum<3>(g, sums, x_[k], dy_[k], weight_);
        store(shift_[k] + g, total.v[0]);
        store(slope_[k] + g, total.v[1]);
        store(drift_[k] + g, total.v[2]);
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
  static constexpr bool kArranged = Groups<A, P>::template kEvensFirst<T>;
  alignas(64) A arranged_[kArranged ? TimestepNormTiles::kChannels : 1];
  const A* weight_;  // arranged for the sums
  int64_t begin_;    // the sequence's first token
  int64_t n_;        // after the step
  int turns_ = 0;    // since the last flush
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

void timestep_norm_backward(const TimestepNormBackward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_group_size<stat_t<T>>(args.K(), [&](auto size) { backward<T, decltype(size)::value>(args); });
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

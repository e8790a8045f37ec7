// layer_norm on the CPU.
//
// Computes  y = (x - mean) * rstd * (weight + 1) + bias and its gradients (ops/layer_norm.h).
// Layout    rows of D contiguous elements; mean and rstd one per row; all compact.
// Mapping   rows are split over the threads; a row is walked twice, or three times where its mean is large (forward),
//           the first time from memory, then out of L1 or L2: short rows several together (core/rows.h). Outputs larger
//           than the caches go past them (core/past.h).
// Traffic   forward 2, backward 3 elements moved per element: memory-bound.
// Numerics  sums of x and x^2 in vector accumulators of float (double for float64); where the mean is large they would
//           cancel, and the variance is that of the differences from the mean. dweight and dbias: one partial sum per
//           fixed part of the rows, added in order, so the result does not depend on the number of threads.
// Limits    none; D = 0 gives empty rows.
#include "ops/layer_norm.h"

#include "core/past.h"
#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

// A row whose variance is at least so many squares of its mean has it from the sums of x and x^2: the subtraction then
// costs less than a bit.
constexpr int kSquaresOfMean = 8;

// Any other row's: the sum of (x - mean)^2.
template <class T>
__attribute__((noinline)) stat_t<T> sum_squares_about(const T* x, stat_t<T> mean, int64_t D) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  Vec<A> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {
    for (int k = 0; k < 4; k += 2) {
      const Pair<A> u = load_pair(x + i + k * W);
      for (int m = 0; m < 2; ++m) sums[k + m] += (u.v[m] - mean) * (u.v[m] - mean);
    }
  }
  for (; i < D; i += W) {
    const Vec<A> d = first_lanes(load(x + i, D - i) - mean, D - i);
    sums[0] += d * d;
  }
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T, bool kWeighted>
void forward(const LayerNormForward& args) {
  using A = stat_t<T>;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  const int64_t D = args.D;
  const auto* weight = static_cast<const A*>(args.weight);
  const auto* bias = static_cast<const A*>(args.bias);
  const bool past = leaves_caches(args.R * D, D, static_cast<T*>(args.y));

  parallel_for(args.R, grain_of_rows(D), [&](int64_t begin, int64_t end) {
    for_rows<A>(begin, end, D * sizeof(T), kBytesTogether<T>, [&](int64_t r, auto rows) __attribute__((always_inline)) {
      const T* x = static_cast<const T*>(args.x) + r * D;
      T* y = static_cast<T*>(args.y) + r * D;
      A *means = static_cast<A*>(args.mean) + r, *rstds = static_cast<A*>(args.rstd) + r;
      const Vecs<A, 2> sums =
          sum_rows<A, 2>(rows, [&](int64_t k) __attribute__((always_inline)) { return sum_moments(x + k * D, D); });
      const V mean = sums.v[0] / static_cast<A>(D);
      V variance = sums.v[1] / static_cast<A>(D) - mean * mean;
      store(means, mean, rows);
      for (int64_t k = 0; k < rows; ++k) {
        if (kSquaresOfMean * mean[k] * mean[k] <= variance[k]) continue;
        variance[k] = sum_squares_about(x + k * D, mean[k], D) / static_cast<A>(D);
      }
      store(rstds, A(1) / sqrt(variance + static_cast<A>(args.eps)), rows);
      for (int64_t k = 0; k < rows; ++k, x += D, y += D) {
        const A mean = means[k], rstd = rstds[k];
        int64_t i = 0;
        for (; i + 2 * W <= D; i += 2 * W) {
          Pair<A> u = load_pair(x + i);
          for (V& v : u.v) v = (v - mean) * rstd;
          if constexpr (kWeighted) {
            const Pair<A> w = load_pair(weight + i), b = load_pair(bias + i);
            for (int m = 0; m < 2; ++m) u.v[m] = u.v[m] * w.v[m] + (u.v[m] + b.v[m]);
          }
          put_pair(y + i, u, past);
        }
        for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
          const V xh = (load(x + k, n) - mean) * rstd;
          store(y + k, kWeighted ? xh * load(weight + k, n) + (xh + load(bias + k, n)) : xh, n);
        });
      }
    });
    if (past) finish_puts();
  });
}

// One row of backward, first walk: adds to dweight and dbias, and gives the sums of u and u * xh.
template <class T, bool kWeighted>
__attribute__((always_inline)) inline Vecs<stat_t<T>, 2> backward_sums(const T* dy, const T* x, const stat_t<T>* weight,
                                                                       stat_t<T> mean, stat_t<T> rstd, int64_t D,
                                                                       stat_t<T>* dw, stat_t<T>* db) {
  using A = stat_t<T>;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  V sum_u[2] = {}, sum_uxh[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W) {
    const Pair<A> g = load_pair(dy + i), v = load_pair(x + i);
    Pair<A> w{}, total_w{}, total_b{};  // loaded before they are stored: that the places may be alike costs time
    if constexpr (kWeighted) w = load_pair(weight + i), total_w = load_pair(dw + i), total_b = load_pair(db + i);
    for (int m = 0; m < 2; ++m) {
      const V xh = (v.v[m] - mean) * rstd;
      const V u = kWeighted ? g.v[m] * w.v[m] + g.v[m] : g.v[m];
      sum_u[m] += u;
      sum_uxh[m] = u * xh + sum_uxh[m];
      total_w.v[m] = g.v[m] * xh + total_w.v[m];
      total_b.v[m] += g.v[m];
    }
    if constexpr (kWeighted) store_pair(dw + i, total_w), store_pair(db + i, total_b);
  }
  for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    const V g = load(dy + k, n);  // 0 beyond the row, and so is u
    const V xh = (load(x + k, n) - mean) * rstd;
    const V u = kWeighted ? g * load(weight + k, n) + g : g;
    sum_u[0] += u;
    sum_uxh[0] = u * xh + sum_uxh[0];
    if constexpr (kWeighted) {
      store(dw + k, g * xh + load(dw + k, n), n);
      store(db + k, g + load(db + k, n), n);
    }
  });
  return {{sum_u[0] + sum_u[1], sum_uxh[0] + sum_uxh[1]}};
}

// The second: dx.
template <class T, bool kWeighted>
__attribute__((always_inline)) inline void backward_row(const T* dy, const T* x, const stat_t<T>* weight,
                                                        stat_t<T> mean, stat_t<T> rstd, stat_t<T> mean_u,
                                                        stat_t<T> slope, int64_t D, T* dx, bool past) {
  using A = stat_t<T>;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W) {
    const Pair<A> g = load_pair(dy + i), v = load_pair(x + i);
    Pair<A> w{};
    if constexpr (kWeighted) w = load_pair(weight + i);
    Pair<A> out;
    for (int m = 0; m < 2; ++m) {
      const V u = kWeighted ? g.v[m] * w.v[m] + g.v[m] : g.v[m];
      out.v[m] = (u - mean_u - (v.v[m] - mean) * slope) * rstd;
    }
    put_pair(dx + i, out, past);
  }
  for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    const V g = load(dy + k, n);
    const V u = kWeighted ? g * load(weight + k, n) + g : g;
    store(dx + k, (u - mean_u - (load(x + k, n) - mean) * slope) * rstd, n);
  });
}

template <class T, bool kWeighted>
void backward(const LayerNormBackward& args) {
  using A = stat_t<T>;
  const int64_t D = args.D;
  const auto* weight = static_cast<const A*>(args.weight);
  const Parts parts = args.parts;
  const bool past = leaves_caches(args.R * D, D, static_cast<T*>(args.dx));
  auto* dweight = static_cast<A*>(args.workspace);
  auto* dbias = dweight + parts.parts * D;

  parallel_for(parts.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      A* dw = dweight + p * D;
      A* db = dbias + p * D;
      if constexpr (kWeighted) {
        std::memset(dw, 0, D * sizeof(A));
        std::memset(db, 0, D * sizeof(A));
      }
      for_rows<A>(parts.begin(p), parts.end(p), 2 * D * sizeof(T), kBytesTogether<T>,
                  [&](int64_t r, auto rows) __attribute__((always_inline)) {
                    const T *dy = static_cast<const T*>(args.dy) + r * D, *x = static_cast<const T*>(args.x) + r * D;
                    T* dx = static_cast<T*>(args.dx) + r * D;
                    const A *mean = static_cast<const A*>(args.mean) + r, *rstd = static_cast<const A*>(args.rstd) + r;
                    const Vecs<A, 2> sums = sum_rows<A, 2>(rows, [&](int64_t k) __attribute__((always_inline)) {
                      return backward_sums<T, kWeighted>(dy + k * D, x + k * D, weight, mean[k], rstd[k], D, dw, db);
                    });
                    A mean_u[kLanes<A>], mean_uxh[kLanes<A>];
                    store(mean_u, sums.v[0] / static_cast<A>(D));
                    store(mean_uxh, sums.v[1] / static_cast<A>(D));
                    for (int64_t k = 0; k < rows; ++k) {
                      backward_row<T, kWeighted>(dy + k * D, x + k * D, weight, mean[k], rstd[k], mean_u[k],
                                                 rstd[k] * mean_uxh[k], D, dx + k * D, past);
                    }
                  });
    }
    if (past) finish_puts();
  });
  if constexpr (!kWeighted) return;
  add_parts(dweight, parts.parts, D, static_cast<A*>(args.dweight));
  add_parts(dbias, parts.parts, D, static_cast<A*>(args.dbias));
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.weight == nullptr ? forward<T, false>(args) : forward<T, true>(args);
  });
}

void layer_norm_backward(const LayerNormBackward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.weight == nullptr ? backward<T, false>(args) : backward<T, true>(args);
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_layer_norm_forward_outputs(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                                    double eps, megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("layer_norm");
    check_layer_norm(c, x, weight, bias, eps, Outputs(outputs));
  });
}

extern "C" int megalodon_layer_norm_forward(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, double eps,
                                            DLTensor* y, DLTensor* mean, DLTensor* rstd, void* stream) {
  return guarded([&] {
    Checker c("layer_norm");
    const LayerNormForward args = check_layer_norm(c, x, weight, bias, eps, {y, mean, rstd});
    run_on(c, args, cpu::layer_norm_forward, cuda::layer_norm_forward, stream);
  });
}

extern "C" int megalodon_layer_norm_backward_outputs(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                                     const DLTensor* mean, const DLTensor* rstd,
                                                     megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("layer_norm_backward");
    check_layer_norm_backward(c, dy, x, weight, mean, rstd, Outputs(outputs));
  });
}

extern "C" int megalodon_layer_norm_backward(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                             const DLTensor* mean, const DLTensor* rstd, DLTensor* dx,
                                             DLTensor* dweight, DLTensor* dbias, DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("layer_norm_backward");
    const LayerNormBackward args =
        check_layer_norm_backward(c, dy, x, weight, mean, rstd, {dx, dweight, dbias, workspace});
    run_on(c, args, cpu::layer_norm_backward, cuda::layer_norm_backward, stream);
  });
}
#endif

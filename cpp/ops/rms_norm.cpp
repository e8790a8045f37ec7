// rms_norm on the CPU.
//
// Computes  y = x * rstd * (weight + 1), rstd = 1 / sqrt(mean(x^2) + eps), and its gradients (ops/rms_norm.h).
// Layout    rows of D contiguous elements; rstd one per row; all compact.
// Mapping   rows are split over the threads; a row is walked twice, the second time out of L1 or L2: short rows several
//           together (core/rows.h). Outputs larger than the caches go past them (core/past.h).
// Traffic   forward 2, backward 3 elements moved per element, 2 and 8 FLOPs: memory-bound.
// Numerics  sums of a row in four vector accumulators of float (double for float64). dweight: one partial sum per
//           fixed part of the rows, added in order, so the result does not depend on the number of threads.
// Limits    none; D = 0 gives empty rows.
#include "ops/rms_norm.h"

#include "core/past.h"
#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

template <class T, bool kWeighted>
void forward(const RmsNormForward& args) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t D = args.D;
  const auto* weight = static_cast<const A*>(args.weight);
  const bool past = leaves_caches(args.R * D, D, static_cast<T*>(args.y));

  parallel_for(args.R, grain_of_rows(D), [&](int64_t begin, int64_t end) {
    for_rows<A>(begin, end, D * sizeof(T), kBytesTogether<T>, [&](int64_t r, auto rows) __attribute__((always_inline)) {
      const T* x = static_cast<const T*>(args.x) + r * D;
      T* y = static_cast<T*>(args.y) + r * D;
      const Vecs<A, 1> sums = sum_rows<A, 1>(
          rows, [&](int64_t k) __attribute__((always_inline)) { return Vecs<A, 1>{{sum_moments(x + k * D, D).v[1]}}; });
      const Vec<A> rstd = A(1) / sqrt(sums.v[0] / static_cast<A>(D) + static_cast<A>(args.eps));
      store(static_cast<A*>(args.rstd) + r, rstd, rows);
      for (int64_t k = 0; k < rows; ++k, x += D, y += D) {
        const A scale = static_cast<A*>(args.rstd)[r + k];
        int64_t i = 0;
        for (; i + 2 * W <= D; i += 2 * W) {
          Pair<A> u = load_pair(x + i);
          for (Vec<A>& v : u.v) v *= scale;
          if constexpr (kWeighted) {
            const Pair<A> w = load_pair(weight + i);
            for (int m = 0; m < 2; ++m) u.v[m] = u.v[m] * w.v[m] + u.v[m];
          }
          put_pair(y + i, u, past);
        }
        for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
          const Vec<A> v = load(x + k, n) * scale;
          store(y + k, kWeighted ? v * load(weight + k, n) + v : v, n);
        });
      }
    });
    if (past) finish_puts();
  });
}

// One row of backward, first walk: adds to dweight, and gives the sum of u * xh.
template <class T, bool kWeighted>
__attribute__((always_inline)) inline Vecs<stat_t<T>, 1> backward_sum(const T* dy, const T* x, const stat_t<T>* weight,
                                                                      stat_t<T> rstd, int64_t D, stat_t<T>* dw) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  Vec<A> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W) {
    const Pair<A> g = load_pair(dy + i), v = load_pair(x + i);
    Pair<A> w{}, total{};
    if constexpr (kWeighted) w = load_pair(weight + i), total = load_pair(dw + i);
    for (int m = 0; m < 2; ++m) {
      const Vec<A> gxh = g.v[m] * (v.v[m] * rstd);
      sums[m] += kWeighted ? gxh * w.v[m] + gxh : gxh;
      total.v[m] += gxh;
    }
    if constexpr (kWeighted) store_pair(dw + i, total);
  }
  for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    const Vec<A> gxh = load(dy + k, n) * (load(x + k, n) * rstd);
    sums[0] += kWeighted ? gxh * load(weight + k, n) + gxh : gxh;
    if constexpr (kWeighted) store(dw + k, load(dw + k, n) + gxh, n);
  });
  return {{sums[0] + sums[1]}};
}

// The second: dx.
template <class T, bool kWeighted>
__attribute__((always_inline)) inline void backward_row(const T* dy, const T* x, const stat_t<T>* weight,
                                                        stat_t<T> rstd, stat_t<T> slope, int64_t D, T* dx, bool past) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W) {
    const Pair<A> g = load_pair(dy + i), v = load_pair(x + i);
    Pair<A> w{};
    if constexpr (kWeighted) w = load_pair(weight + i);
    Pair<A> out;
    for (int m = 0; m < 2; ++m) {
      const Vec<A> u = kWeighted ? g.v[m] * w.v[m] + g.v[m] : g.v[m];
      out.v[m] = (u - v.v[m] * slope) * rstd;
    }
    put_pair(dx + i, out, past);
  }
  for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    const Vec<A> g = load(dy + k, n);
    const Vec<A> u = kWeighted ? g * load(weight + k, n) + g : g;
    store(dx + k, (u - load(x + k, n) * slope) * rstd, n);
  });
}

template <class T, bool kWeighted>
void backward(const RmsNormBackward& args) {
  using A = stat_t<T>;
  const int64_t D = args.D;
  const auto* weight = static_cast<const A*>(args.weight);
  auto* partial = static_cast<A*>(args.workspace);
  const Parts parts = args.parts;
  const bool past = leaves_caches(args.R * D, D, static_cast<T*>(args.dx));

  parallel_for(parts.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      A* dw = kWeighted ? partial + p * D : nullptr;
      if constexpr (kWeighted) std::memset(dw, 0, D * sizeof(A));
      for_rows<A>(parts.begin(p), parts.end(p), 2 * D * sizeof(T), kBytesTogether<T>,
                  [&](int64_t r, auto rows) __attribute__((always_inline)) {
                    const T *dy = static_cast<const T*>(args.dy) + r * D, *x = static_cast<const T*>(args.x) + r * D;
                    T* dx = static_cast<T*>(args.dx) + r * D;
                    const A* rstd = static_cast<const A*>(args.rstd) + r;
                    const Vecs<A, 1> sums = sum_rows<A, 1>(rows, [&](int64_t k) __attribute__((always_inline)) {
                      return backward_sum<T, kWeighted>(dy + k * D, x + k * D, weight, rstd[k], D, dw);
                    });
                    A means[kLanes<A>];
                    store(means, sums.v[0] / static_cast<A>(D));
                    for (int64_t k = 0; k < rows; ++k) {
                      backward_row<T, kWeighted>(dy + k * D, x + k * D, weight, rstd[k], rstd[k] * means[k], D,
                                                 dx + k * D, past);
                    }
                  });
    }
    if (past) finish_puts();
  });
  if constexpr (kWeighted) add_parts(partial, parts.parts, D, static_cast<A*>(args.dweight));
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.weight == nullptr ? forward<T, false>(args) : forward<T, true>(args);
  });
}

void rms_norm_backward(const RmsNormBackward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.weight == nullptr ? backward<T, false>(args) : backward<T, true>(args);
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_rms_norm_forward_outputs(const DLTensor* x, const DLTensor* weight, double eps,
                                                  megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("rms_norm");
    check_rms_norm(c, x, weight, eps, Outputs(outputs));
  });
}

extern "C" int megalodon_rms_norm_forward(const DLTensor* x, const DLTensor* weight, double eps, DLTensor* y,
                                          DLTensor* rstd, void* stream) {
  return guarded([&] {
    Checker c("rms_norm");
    const RmsNormForward args = check_rms_norm(c, x, weight, eps, {y, rstd});
    run_on(c, args, cpu::rms_norm_forward, cuda::rms_norm_forward, stream);
  });
}

extern "C" int megalodon_rms_norm_backward_outputs(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                                   const DLTensor* rstd, megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("rms_norm_backward");
    check_rms_norm_backward(c, dy, x, weight, rstd, Outputs(outputs));
  });
}

extern "C" int megalodon_rms_norm_backward(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                           const DLTensor* rstd, DLTensor* dx, DLTensor* dweight, DLTensor* workspace,
                                           void* stream) {
  return guarded([&] {
    Checker c("rms_norm_backward");
    const RmsNormBackward args = check_rms_norm_backward(c, dy, x, weight, rstd, {dx, dweight, workspace});
    run_on(c, args, cpu::rms_norm_backward, cuda::rms_norm_backward, stream);
  });
}
#endif

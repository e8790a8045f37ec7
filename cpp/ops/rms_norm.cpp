// rms_norm on the CPU.
//
// Computes  y = x * rstd * (weight + 1), rstd = 1 / sqrt(mean(x^2) + eps), and its gradients (ops/rms_norm.h).
// Layout    rows of D contiguous elements; rstd one per row; all compact.
// Mapping   rows are split over the threads; a row is walked twice, the second time out of L1 or L2.
// Traffic   forward 2, backward 3 elements moved per element, 2 and 8 FLOPs: memory-bound.
// Numerics  sums of a row in four vector accumulators of float (double for float64). dweight: one partial sum per
//           fixed part of the rows, added in order, so the result does not depend on the number of threads.
// Limits    none; D = 0 gives empty rows.
#include "ops/rms_norm.h"

#include <cmath>

#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

template <class T, bool kWeighted>
void forward(const RmsNormForward& args) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t D = args.D;
  const auto* weight = static_cast<const A*>(args.weight);

  parallel_for(args.R, grain_of_rows(D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(args.x) + r * D;
      T* y = static_cast<T*>(args.y) + r * D;
      Vec<A> sums[4] = {};
      int64_t i = 0;
      for (; i + 4 * W <= D; i += 4 * W) {
        for (int k = 0; k < 4; k += 2) {
          const Pair<A> u = load_pair(x + i + k * W);
          for (int m = 0; m < 2; ++m) sums[k + m] = u.v[m] * u.v[m] + sums[k + m];
        }
      }
      for (; i < D; i += W) {
        const Vec<A> v = load(x + i, D - i);
        sums[0] = v * v + sums[0];
      }
      const A sum = sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
      const A scale = A(1) / std::sqrt(sum / static_cast<A>(D) + static_cast<A>(args.eps));
      static_cast<A*>(args.rstd)[r] = scale;
      for (i = 0; i + 2 * W <= D; i += 2 * W) {
        Pair<A> u = load_pair(x + i);
        for (Vec<A>& v : u.v) v *= scale;
        if constexpr (kWeighted) {
          const Pair<A> w = load_pair(weight + i);
          for (int m = 0; m < 2; ++m) u.v[m] = u.v[m] * w.v[m] + u.v[m];
        }
        store_pair(y + i, u);
      }
      for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
        const Vec<A> v = load(x + k, n) * scale;
        store(y + k, kWeighted ? v * load(weight + k, n) + v : v, n);
      });
    }
  });
}

// One row of backward: dx, and what it adds to dweight.
template <class T, bool kWeighted>
__attribute__((always_inline)) inline void backward_row(const T* dy, const T* x, const stat_t<T>* weight,
                                                        stat_t<T> rstd, int64_t D, T* dx, stat_t<T>* dw) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  Vec<A> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W) {
    const Pair<A> g = load_pair(dy + i), v = load_pair(x + i);
    Pair<A> w{};
    if constexpr (kWeighted) w = load_pair(weight + i);
    for (int m = 0; m < 2; ++m) {
      const Vec<A> xh = v.v[m] * rstd;
      const Vec<A> gxh = g.v[m] * xh;
      sums[m] += kWeighted ? gxh * w.v[m] + gxh : gxh;
      if constexpr (kWeighted) store(dw + i + m * W, load(dw + i + m * W) + gxh);
    }
  }
  const int64_t pairs_end = i;
  for_vectors<A>(i, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    const Vec<A> gxh = load(dy + k, n) * (load(x + k, n) * rstd);
    sums[0] += kWeighted ? gxh * load(weight + k, n) + gxh : gxh;
    if constexpr (kWeighted) store(dw + k, load(dw + k, n) + gxh, n);
  });
  const A slope = rstd * (sum_lanes<A>(sums[0] + sums[1]) / static_cast<A>(D));
  for (i = 0; i < pairs_end; i += 2 * W) {
    const Pair<A> g = load_pair(dy + i), v = load_pair(x + i);
    Pair<A> w{};
    if constexpr (kWeighted) w = load_pair(weight + i);
    Pair<A> out;
    for (int m = 0; m < 2; ++m) {
      const Vec<A> u = kWeighted ? g.v[m] * w.v[m] + g.v[m] : g.v[m];
      out.v[m] = (u - v.v[m] * slope) * rstd;
    }
    store_pair(dx + i, out);
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

  parallel_for(parts.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      A* dw = kWeighted ? partial + p * D : nullptr;
      if constexpr (kWeighted) std::memset(dw, 0, D * sizeof(A));
      for (int64_t r = parts.begin(p); r < parts.end(p); ++r) {
        backward_row<T, kWeighted>(static_cast<const T*>(args.dy) + r * D, static_cast<const T*>(args.x) + r * D,
                                   weight, static_cast<const A*>(args.rstd)[r], D, static_cast<T*>(args.dx) + r * D,
                                   dw);
      }
    }
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

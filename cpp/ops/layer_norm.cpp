// layer_norm on the CPU.
//
// Computes  y = (x - mean) * rstd * (weight + 1) + bias and its gradients (ops/layer_norm.h).
// Layout    rows of D contiguous elements; mean and rstd one per row; all compact.
// Mapping   rows are split over the threads; a row is walked three times (twice in backward), the first time from
//           memory, then out of L1 or L2.
// Traffic   forward 2, backward 3 elements moved per element: memory-bound.
// Numerics  the mean first, then the variance of the differences, in vector accumulators of float (double for float64):
//           a large mean does not cancel. dweight and dbias: one partial sum per fixed part of the rows, added in
//           order, so the result does not depend on the number of threads.
// Limits    none; D = 0 gives empty rows.
#include "ops/layer_norm.h"

#include <cmath>

#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

// The sum over a row of f(vector): four accumulators, so that additions do not wait for each other. f gets the vector
// and how many of its lanes are in the row; what it gives for the others must be 0.
template <class T, class F>
inline stat_t<T> sum_row(const T* x, int64_t D, F&& f) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  Vec<A> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {
    for (int k = 0; k < 4; ++k) sums[k] += f(load(x + i + k * W), W);
  }
  for (; i < D; i += W) sums[0] += f(load(x + i, D - i), D - i);
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void forward(const LayerNormForward& args) {
  using A = stat_t<T>;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  const int64_t D = args.D;
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const A*>(args.weight);
  const auto* bias = static_cast<const A*>(args.bias);
  auto* y = static_cast<T*>(args.y);

  parallel_for(args.R, grain_of_rows(D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* xr = x + r * D;
      const A mean = sum_row(xr, D, [](V v, int64_t) { return v; }) / static_cast<A>(D);
      const A square = sum_row(xr, D, [&](V v, int64_t n) {
        const V d = v - mean;
        return n >= W ? d * d : first_lanes(d * d, n);
      });
      const A rstd = A(1) / std::sqrt(square / static_cast<A>(D) + static_cast<A>(args.eps));
      static_cast<A*>(args.mean)[r] = mean;
      static_cast<A*>(args.rstd)[r] = rstd;
      for_vectors<A>(0, D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const V xh = (load(xr + i, n) - mean) * rstd;
        store(y + r * D + i, weight == nullptr ? xh : xh * load(weight + i, n) + (xh + load(bias + i, n)), n);
      });
    }
  });
}

template <class T>
void backward(const LayerNormBackward& args) {
  using A = stat_t<T>;
  using V = Vec<A>;
  const int64_t D = args.D;
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const A*>(args.weight);
  const Parts parts = args.parts;
  auto* dweight = static_cast<A*>(args.workspace);
  auto* dbias = dweight + parts.parts * D;

  parallel_for(parts.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      A* dw = dweight + p * D;
      A* db = dbias + p * D;
      if (weight != nullptr) {
        std::memset(dw, 0, D * sizeof(A));
        std::memset(db, 0, D * sizeof(A));
      }
      for (int64_t r = parts.begin(p); r < parts.end(p); ++r) {
        const T* dyr = static_cast<const T*>(args.dy) + r * D;
        const T* xr = x + r * D;
        const A mean = static_cast<const A*>(args.mean)[r];
        const A rstd = static_cast<const A*>(args.rstd)[r];
        const auto scaled = [&](int64_t i, int64_t n, V g) __attribute__((always_inline)) {
          return weight == nullptr ? g : g * load(weight + i, n) + g;
        };
        V sum_u = {};
        V sum_uxh = {};
        for_vectors<A>(0, D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
          const V g = load(dyr + i, n);  // 0 beyond the row, and so is u
          const V xh = (load(xr + i, n) - mean) * rstd;
          const V u = scaled(i, n, g);
          sum_u += u;
          sum_uxh = u * xh + sum_uxh;
          if (weight == nullptr) return;
          store(dw + i, g * xh + load(dw + i, n), n);
          store(db + i, g + load(db + i, n), n);
        });
        const A mean_u = sum_lanes<A>(sum_u) / static_cast<A>(D);
        const A mean_uxh = sum_lanes<A>(sum_uxh) / static_cast<A>(D);
        for_vectors<A>(0, D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
          const V xh = (load(xr + i, n) - mean) * rstd;
          const V u = scaled(i, n, load(dyr + i, n));
          store(static_cast<T*>(args.dx) + r * D + i, (u - mean_u - xh * mean_uxh) * rstd, n);
        });
      }
    }
  });
  if (weight == nullptr) return;
  add_parts(dweight, parts.parts, D, static_cast<A*>(args.dweight));
  add_parts(dbias, parts.parts, D, static_cast<A*>(args.dbias));
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args) {
  visit_activation(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void layer_norm_backward(const LayerNormBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
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

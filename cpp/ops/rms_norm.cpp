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

template <class T>
void forward(const RmsNormForward& args) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t D = args.D;
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const A*>(args.weight);
  auto* y = static_cast<T*>(args.y);
  auto* rstd = static_cast<A*>(args.rstd);

  parallel_for(args.R, grain_of_rows(D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* xr = x + r * D;
      T* yr = y + r * D;
      Vec<A> sums[4] = {};
      int64_t i = 0;
      for (; i + 4 * W <= D; i += 4 * W) {
        for (int k = 0; k < 4; ++k) {
          const Vec<A> v = load(xr + i + k * W);
          sums[k] = v * v + sums[k];
        }
      }
      for (; i < D; i += W) {
        const Vec<A> v = load(xr + i, D - i);
        sums[0] = v * v + sums[0];
      }
      const A sum = sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
      const A scale = A(1) / std::sqrt(sum / static_cast<A>(D) + static_cast<A>(args.eps));
      rstd[r] = scale;
      for_vectors<A>(0, D, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
        const Vec<A> v = load(xr + k, n) * scale;
        store(yr + k, weight == nullptr ? v : v * load(weight + k, n) + v, n);
      });
    }
  });
}

template <class T>
void backward(const RmsNormBackward& args) {
  using A = stat_t<T>;
  const int64_t D = args.D;
  const auto* dy = static_cast<const T*>(args.dy);
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const A*>(args.weight);
  const auto* rstd = static_cast<const A*>(args.rstd);
  auto* dx = static_cast<T*>(args.dx);
  auto* partial = static_cast<A*>(args.workspace);
  const Parts parts = args.parts;

  parallel_for(parts.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      A* dw = weight == nullptr ? nullptr : partial + p * D;
      if (dw != nullptr) std::memset(dw, 0, D * sizeof(A));
      for (int64_t r = parts.begin(p); r < parts.end(p); ++r) {
        const T* dyr = dy + r * D;
        const T* xr = x + r * D;
        const A scale = rstd[r];
        Vec<A> sums = {};
        for_vectors<A>(0, D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
          const Vec<A> g = load(dyr + i, n);
          const Vec<A> xh = load(xr + i, n) * scale;
          const Vec<A> u = weight == nullptr ? g : g * load(weight + i, n) + g;
          sums = u * xh + sums;
          if (dw != nullptr) store(dw + i, g * xh + load(dw + i, n), n);
        });
        const A mean = sum_lanes<A>(sums) / static_cast<A>(D);
        for_vectors<A>(0, D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
          const Vec<A> g = load(dyr + i, n);
          const Vec<A> xh = load(xr + i, n) * scale;
          const Vec<A> u = weight == nullptr ? g : g * load(weight + i, n) + g;
          store(dx + r * D + i, (u - xh * mean) * scale, n);
        });
      }
    }
  });
  if (weight != nullptr) add_parts(partial, parts.parts, D, static_cast<A*>(args.dweight));
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args) {
  visit_activation(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void rms_norm_backward(const RmsNormBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
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

// silu_mul on the CPU.
//
// Computes  y = silu(a) * b (b optional) and its gradients (ops/silu_mul.h).
// Layout    flat arrays of n elements.
// Mapping   ranges of elements are split over the threads; two vectors at a time. Outputs larger than the caches go
//           past them (core/past.h).
// Traffic   forward 3, backward 5 elements moved per element (2 and 3 without b); an exp and a division each.
// Numerics  in float (double for float64); sigmoid through e^-a, which is inf for a < -88 and then gives exactly 0. Of
//           16-bit results a sigmoid of fewer instructions (sigmoid_for in core/elementary.h).
// Limits    none.
#include "ops/silu_mul.h"

#include <iterator>

#include "core/elementary.h"
#include "core/parallel.h"
#include "core/past.h"
#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kChunk = 64;     // elements: ranges start where lines of memory do
constexpr int64_t kGrain = 16384;  // a thread should get at least

// Calls body(load, store) for the vectors of the chunks of [begin, end) of n elements, which are loaded and stored in
// pairs as long as there are two: load(p) gives those of p as an array of N vectors, store(p, vectors) is the way back,
// past the caches if so.
template <class T, class Body>
__attribute__((always_inline)) inline void for_pairs(int64_t begin, int64_t end, int64_t n, bool past,
                                                     const Body& body) {
  using A = stat_t<T>;
  begin *= kChunk, end = end * kChunk < n ? end * kChunk : n;
  constexpr int64_t W = kLanes<A>;
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W) {
    body([&](const T* p) __attribute__((always_inline)) { return load_pair(p + i); },
         [&](T* p, const Pair<A>& u) __attribute__((always_inline)) { put_pair(p + i, u, past); });
  }
  for_vectors<A>(i, end, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    body([&](const T* p) __attribute__((always_inline)) { return Vecs<A, 1>{{load(p + k, n)}}; },
         [&](T* p, const Vecs<A, 1>& u) __attribute__((always_inline)) { store(p + k, u.v[0], n); });
  });
  if (past) finish_puts();
}

template <class T, bool kGated>
void forward(const SiluMulForward& args) {
  const auto* a = static_cast<const T*>(args.a);
  const auto* b = static_cast<const T*>(args.b);
  auto* y = static_cast<T*>(args.y);
  const bool past = leaves_caches(args.n, kChunk, y);
  parallel_for(ceil_div(args.n, kChunk), kGrain / kChunk, [=](int64_t begin, int64_t end) {
    for_pairs<T>(begin, end, args.n, past, [=](const auto& load, const auto& store) __attribute__((always_inline)) {
      auto u = load(a);
      for (auto& v : u.v) v *= sigmoid_for<T>(v);
      if constexpr (kGated) {
        const auto gate = load(b);
        for (size_t m = 0; m < std::size(u.v); ++m) u.v[m] *= gate.v[m];
      }
      store(y, u);
    });
  });
}

template <class T, bool kGated>
void backward(const SiluMulBackward& args) {
  using A = stat_t<T>;
  const auto* dy = static_cast<const T*>(args.dy);
  const auto* a = static_cast<const T*>(args.a);
  const auto* b = static_cast<const T*>(args.b);
  auto* da = static_cast<T*>(args.da);
  auto* db = static_cast<T*>(args.db);
  const int64_t count = kGated ? 2 * args.n : args.n;
  const bool past = leaves_caches(count, kChunk, da) && (!kGated || leaves_caches(count, kChunk, db));
  parallel_for(ceil_div(args.n, kChunk), kGrain / kChunk, [=](int64_t begin, int64_t end) {
    for_pairs<T>(begin, end, args.n, past, [=](const auto& load, const auto& store) __attribute__((always_inline)) {
      auto u = load(a), g = load(dy);
      auto gate = u;
      if constexpr (kGated) gate = load(b);
      for (size_t m = 0; m < std::size(u.v); ++m) {
        const Vec<A> s = sigmoid_for<T>(u.v[m]);
        const Vec<A> silu = u.v[m] * s;
        const Vec<A> slope = s + silu * (1 - s);
        u.v[m] = kGated ? g.v[m] * gate.v[m] * slope : g.v[m] * slope;
        g.v[m] *= silu;
      }
      store(da, u);
      if constexpr (kGated) store(db, g);
    });
  });
}

}  // namespace

void silu_mul_forward(const SiluMulForward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.b == nullptr ? forward<T, false>(args) : forward<T, true>(args);
  });
}

void silu_mul_backward(const SiluMulBackward& args) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.b == nullptr ? backward<T, false>(args) : backward<T, true>(args);
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_silu_mul_forward_outputs(const DLTensor* a, const DLTensor* b, megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("silu_mul");
    check_silu_mul(c, a, b, Outputs(outputs));
  });
}

extern "C" int megalodon_silu_mul_forward(const DLTensor* a, const DLTensor* b, DLTensor* y, void* stream) {
  return guarded([&] {
    Checker c("silu_mul");
    const SiluMulForward args = check_silu_mul(c, a, b, {y});
    run_on(c, args, cpu::silu_mul_forward, cuda::silu_mul_forward, stream);
  });
}

extern "C" int megalodon_silu_mul_backward_outputs(const DLTensor* dy, const DLTensor* a, const DLTensor* b,
                                                   megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("silu_mul_backward");
    check_silu_mul_backward(c, dy, a, b, Outputs(outputs));
  });
}

extern "C" int megalodon_silu_mul_backward(const DLTensor* dy, const DLTensor* a, const DLTensor* b, DLTensor* da,
                                           DLTensor* db, void* stream) {
  return guarded([&] {
    Checker c("silu_mul_backward");
    const SiluMulBackward args = check_silu_mul_backward(c, dy, a, b, {da, db});
    run_on(c, args, cpu::silu_mul_backward, cuda::silu_mul_backward, stream);
  });
}
#endif

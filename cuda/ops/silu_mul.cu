// silu_mul on the GPU. Not yet run on a GPU.
//
// Computes  y = silu(a) * b or silu(a), silu(u) = u * sigmoid(u), and its gradients (ops/silu_mul.h).
// Layout    n contiguous elements each, of one type.
// Mapping   a thread per 16-byte pack, in strides of the grid.
// Traffic   forward 3, backward 5 elements moved per element (2 and 3 without b), an exponential each: memory-bound.
// Numerics  in float (double for float64); a large negative a gives exp(-a) = inf and sigmoid 0.
// Limits    none; arrays that are no multiple of 16 bytes, or not so aligned, go element by element.
#include "core/pack.cuh"
#include "ops/silu_mul.h"

namespace megalodon::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // several waves of an H100, so that the last one costs little

template <class A>
DEVICE A sigmoid(A value) {
  return A(1) / (A(1) + exp(-value));
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) silu_mul_forward_kernel(const T* a, const T* b, T* y, int64_t n) {
  using A = stat_t<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * V;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; i < n; i += step) {
    Pack<T, V> as = load<V>(a + i);
    Pack<T, V> bs = as;
    if (b != nullptr) bs = load<V>(b + i);
    UNROLL
    for (int j = 0; j < V; ++j) {
      const A value = widen(as.v[j]);
      const A silu = value * sigmoid(value);
      as.v[j] = narrow<T>(b == nullptr ? silu : silu * widen(bs.v[j]));
    }
    store(y + i, as);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    silu_mul_backward_kernel(const T* dy, const T* a, const T* b, T* da, T* db, int64_t n) {
  using A = stat_t<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * V;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; i < n; i += step) {
    const Pack<T, V> dys = load<V>(dy + i);
    Pack<T, V> as = load<V>(a + i);
    Pack<T, V> bs = as;
    if (b != nullptr) bs = load<V>(b + i);
    UNROLL
    for (int j = 0; j < V; ++j) {
      const A g = widen(dys.v[j]);
      const A value = widen(as.v[j]);
      const A s = sigmoid(value);
      const A u = b == nullptr ? g : g * widen(bs.v[j]);
      as.v[j] = narrow<T>(u * (s + value * s * (A(1) - s)));
      bs.v[j] = narrow<T>(g * value * s);
    }
    store(da + i, as);
    if (b != nullptr) store(db + i, bs);
  }
}

dim3 grid_of(int64_t n, int V) {
  const int64_t blocks = (n + kThreads * V - 1) / (kThreads * V);
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

template <class T, int V>
void forward(const SiluMulForward& args, void* stream) {
  launch({"silu_mul_forward", grid_of(args.n, V), dim3(kThreads), 0, stream}, silu_mul_forward_kernel<T, V>,
         static_cast<const T*>(args.a), static_cast<const T*>(args.b), static_cast<T*>(args.y), args.n);
}

template <class T, int V>
void backward(const SiluMulBackward& args, void* stream) {
  launch({"silu_mul_backward", grid_of(args.n, V), dim3(kThreads), 0, stream}, silu_mul_backward_kernel<T, V>,
         static_cast<const T*>(args.dy), static_cast<const T*>(args.a), static_cast<const T*>(args.b),
         static_cast<T*>(args.da), static_cast<T*>(args.db), args.n);
}

}  // namespace

void silu_mul_forward(const SiluMulForward& args, void* stream) {
  if (args.n == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = can_pack<T>(args.n, args.a, args.b, args.y);
    packed ? forward<T, kPackOf<T>>(args, stream) : forward<T, 1>(args, stream);
  });
}

void silu_mul_backward(const SiluMulBackward& args, void* stream) {
  if (args.n == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = can_pack<T>(args.n, args.dy, args.a, args.b, args.da, args.db);
    packed ? backward<T, kPackOf<T>>(args, stream) : backward<T, 1>(args, stream);
  });
}

}  // namespace megalodon::cuda

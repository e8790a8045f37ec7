// fft_conv on the CPU.
//
// Computes  y_t = sum over s <= t of k_s x_(t-s) per channel, and its gradients, by a transform of H >= L points
//           (core/fft.h; ops/fft_conv.h).
// Layout    x, y (B, L, D) as they are, one vector of channels at a time, no transposed copies; k (D, L) is turned into
//           columns of channels in tiles. A transformed array holds H (re, im) pairs of vectors: 128 H bytes.
// Mapping   tasks are groups of channels; a task transforms its kernels once and walks through the batch.
// Traffic   per element of x about 8 log2(H) vector operations forward (two transforms), 12 log2(H) backward, plus one
//           transform of k (two with dk) per channel. Compute-bound while 128 H bytes stay in L2, L3-bound beyond.
// Numerics  constants made in float64; float32 (float64 for float64) arithmetic: relative RMS error below 3e-7. A
//           transform spreads rounding over the whole row: y_t depends on later x by rounding alone, at the scale of
//           the row's largest values. dk is summed over the batch in order: deterministic for any number of threads.
//           Subnormal numbers count as zeros.
// Limits    a NaN or inf spreads over its row and channel, backwards in time too. Up to 64 slots of 256 H bytes of
//           workspace forward and 512 H backward (fewer above 1 GiB); a thread touches one of them. D below the vector
//           length wastes lanes, and few channels occupy few threads.
#include "ops/fft_conv.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kAhead = 8;  // steps to fetch ahead

// The transform of the kernels of `lanes` channels, divided by H.
template <class A>
void transform_kernel(const Fft<A>& fft, const A* rows, int64_t L, int64_t lanes, Vec<A>* z) {
  const A scale = A(1) / static_cast<A>(fft.points());
  for (int64_t t = 0; t < L; t += kTile) {
    Vec<A> tile[kTile];
    const int64_t n = L - t < kTile ? L - t : kTile;
    gather_lanes(rows + t, L, lanes, n, tile);
    for (int64_t i = 0; i < n; ++i) z[2 * (t + i)] = tile[i] * scale;
  }
  fft.root(z, L, [&](int64_t t) { return z[2 * t]; });
  fft.forward(z);
}

template <class T>
void forward(const FftConvForward& args) {
  using A = stat_t<T>;
  const int64_t L = args.L, D = args.D;
  if (args.B * L * D == 0) return;
  const auto* x = static_cast<const T*>(args.x);
  const auto* k = static_cast<const A*>(args.k);
  auto* y = static_cast<T*>(args.y);
  char* table = aligned(args.workspace);
  const Fft<A> fft(args.points(), table);
  fft.fill();

  for_channels<A>(args.tasks(), table + args.table_bytes(), [&](int64_t d, int64_t lanes, Slot slot) {
    auto* spectrum = slot.take<Vec<A>>(2 * fft.points());
    auto* z = slot.take<Vec<A>>(2 * fft.points());
    transform_kernel(fft, k + d * L, L, lanes, spectrum);
    with_lanes<A>(lanes, [&](auto full) {
      for (int64_t b = 0; b < args.B; ++b) {
        const T* xb = x + b * L * D + d;
        T* yb = y + b * L * D + d;
        fft.root(z, L, [&](int64_t t) { return load_step<full.value>(xb + t * D, lanes, kAhead * D); });
        fft.multiply(z, spectrum);
        fft.root_inverse(z, L, [&](int64_t t, Vec<A> v) { store_step<full.value>(yb + t * D, v, lanes, kAhead * D); });
      }
    });
  });
}

template <class T>
void backward(const FftConvBackward& args) {
  using A = stat_t<T>;
  const int64_t L = args.L, D = args.D;
  if (L * D == 0) return;
  const auto* dy = static_cast<const T*>(args.dy);
  const auto* x = static_cast<const T*>(args.x);
  const auto* k = static_cast<const A*>(args.k);
  auto* dx = static_cast<T*>(args.dx);
  auto* dk = static_cast<A*>(args.dk);
  char* table = aligned(args.workspace);
  const Fft<A> fft(args.points(), table);
  fft.fill();

  for_channels<A>(args.tasks(), table + args.table_bytes(), [&](int64_t d, int64_t lanes, Slot slot) {
    const int64_t H = fft.points();
    auto* spectrum = slot.take<Vec<A>>(2 * H);
    auto* reversed = slot.take<Vec<A>>(2 * H);
    auto* z = slot.take<Vec<A>>(2 * H);
    auto* sum = slot.take<Vec<A>>(2 * H);
    transform_kernel(fft, k + d * L, L, lanes, spectrum);
    std::memset(sum, 0, 2 * H * sizeof(Vec<A>));
    with_lanes<A>(lanes, [&](auto full) {
      for (int64_t b = 0; b < args.B; ++b) {
        const int64_t first = b * L * D + d, last = first + (L - 1) * D;
        fft.root(reversed, L, [&](int64_t t) { return load_step<full.value>(dy + last - t * D, lanes, -kAhead * D); });
        fft.root(z, L, [&](int64_t t) { return load_step<full.value>(x + first + t * D, lanes, kAhead * D); });
        fft.multiply_both(reversed, z, spectrum, sum);
        fft.root_inverse(reversed, L, [&](int64_t t, Vec<A> v) {
          store_step<full.value>(dx + last - t * D, v, lanes, -kAhead * D);
        });
      }
    });
    fft.inverse(sum);
    const A scale = A(1) / static_cast<A>(H);
    fft.root_inverse(sum, L, [&](int64_t t, Vec<A> v) { sum[2 * t] = v * scale; });
    for (int64_t t = 0; t < L; t += kTile) {
      Vec<A> tile[kTile];
      const int64_t n = L - t < kTile ? L - t : kTile;
      for (int64_t i = 0; i < n; ++i) tile[i] = sum[2 * (L - 1 - t - i)];
      scatter_lanes(tile, lanes, n, dk + d * L + t, L);
    }
  });
}

}  // namespace

void fft_conv_forward(const FftConvForward& args) {
  visit_activation(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void fft_conv_backward(const FftConvBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_fft_conv_forward_outputs(const DLTensor* x, const DLTensor* k, megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("fft_conv");
    check_fft_conv(c, x, k, Outputs(outputs));
  });
}

extern "C" int megalodon_fft_conv_forward(const DLTensor* x, const DLTensor* k, DLTensor* y, DLTensor* workspace,
                                          void* stream) {
  return guarded([&] {
    Checker c("fft_conv");
    const FftConvForward args = check_fft_conv(c, x, k, {y, workspace});
    run_on(c, args, cpu::fft_conv_forward, cuda::fft_conv_forward, stream);
  });
}

extern "C" int megalodon_fft_conv_backward_outputs(const DLTensor* dy, const DLTensor* x, const DLTensor* k,
                                                   megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("fft_conv_backward");
    check_fft_conv_backward(c, dy, x, k, Outputs(outputs));
  });
}

extern "C" int megalodon_fft_conv_backward(const DLTensor* dy, const DLTensor* x, const DLTensor* k, DLTensor* dx,
                                           DLTensor* dk, DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("fft_conv_backward");
    const FftConvBackward args = check_fft_conv_backward(c, dy, x, k, {dx, dk, workspace});
    run_on(c, args, cpu::fft_conv_backward, cuda::fft_conv_backward, stream);
  });
}
#endif

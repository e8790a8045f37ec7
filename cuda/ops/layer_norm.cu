// layer_norm on the GPU. Not yet run on a GPU.
//
// Computes  y = (x - mean) * rstd * (weight + 1) + bias, rstd = 1 / sqrt(var + eps), and its gradients
//           (ops/layer_norm.h).
// Layout    rows of D contiguous elements; mean and rstd one per row; all compact.
// Mapping   as rms_norm: a row belongs to 32 to 256 threads (RowPlan), which hold it in registers as 16-byte packs;
//           beyond 256 threads' registers it is read again. Backward: a fixed part of the rows each, whose dweight and
//           dbias stay in registers too, and beyond them in the workspace.
// Traffic   forward 2, backward 3 elements moved per element, 5 and 12 FLOPs: memory-bound.
// Numerics  sums in float (double for float64), in a fixed order; the variance is taken around the mean, not as a
//           difference of squares. dweight, dbias: one partial sum per part, added in order.
// Limits    none; rows that are no multiple of 16 bytes, or not so aligned, go element by element.
#include "core/rows.cuh"
#include "ops/layer_norm.h"

namespace megalodon::cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kMaxRowThreads)
    layer_norm_forward_kernel(const T* x, const stat_t<T>* weight, const stat_t<T>* bias, T* y, stat_t<T>* means,
                              stat_t<T>* rstd, int64_t R, int64_t D, stat_t<T> eps) {
  using A = stat_t<T>;
  for (int64_t r = first_row(); r < R; r += row_stride()) {
    const T* xr = x + r * D;
    Pack<T, V> packs[kHeld];
    A sum = 0;
    const auto add = [&](const Pack<T, V>& pack) {
      UNROLL
      for (int j = 0; j < V; ++j) sum += widen(pack.v[j]);
    };
    for_columns<V>(
        D, [&](int k, int64_t i) { add(packs[k] = load<V>(xr + i)); }, [&](int64_t i) { add(load<V>(xr + i)); });
    const A mean = row_sum(sum) / static_cast<A>(D);
    A squares = 0;
    const auto add_square = [&](const Pack<T, V>& pack) {
      UNROLL
      for (int j = 0; j < V; ++j) squares += (widen(pack.v[j]) - mean) * (widen(pack.v[j]) - mean);
    };
    for_columns<V>(D, [&](int k, int64_t) { add_square(packs[k]); }, [&](int64_t i) { add_square(load<V>(xr + i)); });
    const A scale = A(1) / sqrt(row_sum(squares) / static_cast<A>(D) + eps);
    if (threadIdx.x == 0) {
      means[r] = mean;
      rstd[r] = scale;
    }
    const auto finish = [&](Pack<T, V> pack, int64_t i) {
      Pack<A, V> w = {};
      Pack<A, V> b = {};
      if (weight != nullptr) {
        w = load<V>(weight + i);
        b = load<V>(bias + i);
      }
      UNROLL
      for (int j = 0; j < V; ++j) {
        const A xh = (widen(pack.v[j]) - mean) * scale;
        pack.v[j] = narrow<T>(xh * w.v[j] + xh + b.v[j]);
      }
      store(y + r * D + i, pack);
    };
    for_columns<V>(D, [&](int k, int64_t i) { finish(packs[k], i); }, [&](int64_t i) { finish(load<V>(xr + i), i); });
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxRowThreads)
    layer_norm_backward_kernel(const T* dy, const T* x, const stat_t<T>* weight, const stat_t<T>* means,
                               const stat_t<T>* rstd, T* dx, stat_t<T>* partial, Parts parts, int64_t D) {
  using A = stat_t<T>;
  const int64_t part = first_row();
  if (part >= parts.parts) return;  // a whole warp of a block of four
  A* dweight = partial + part * D;
  A* dbias = partial + (parts.parts + part) * D;
  A held_dweight[kHeld][V] = {};
  A held_dbias[kHeld][V] = {};
  if (weight != nullptr) {
    for_columns<V>(
        D, [](int, int64_t) {},
        [&](int64_t i) {
          store(dweight + i, Pack<A, V>{});
          store(dbias + i, Pack<A, V>{});
        });
  }
  for (int64_t r = parts.begin(part); r < parts.end(part); ++r) {
    const T* xr = x + r * D;
    const T* dyr = dy + r * D;
    const A mean = means[r];
    const A scale = rstd[r];
    Pack<T, V> xs[kHeld];
    Pack<T, V> dys[kHeld];
    A sum = 0;       // of u = dy * (weight + 1)
    A products = 0;  // of u * xh
    const auto add = [&](const Pack<T, V>& xp, const Pack<T, V>& dyp, int64_t i, A* dw, A* db) {
      Pack<A, V> w = {};
      if (weight != nullptr) w = load<V>(weight + i);
      UNROLL
      for (int j = 0; j < V; ++j) {
        const A g = widen(dyp.v[j]);
        const A xh = (widen(xp.v[j]) - mean) * scale;
        const A u = g * w.v[j] + g;
        sum += u;
        products += u * xh;
        dw[j] += g * xh;
        db[j] += g;
      }
    };
    for_columns<V>(
        D,
        [&](int k, int64_t i) {
          add(xs[k] = load<V>(xr + i), dys[k] = load<V>(dyr + i), i, held_dweight[k], held_dbias[k]);
        },
        [&](int64_t i) {
          Pack<A, V> dw = {};
          Pack<A, V> db = {};
          if (weight != nullptr) {
            dw = load<V>(dweight + i);
            db = load<V>(dbias + i);
          }
          add(load<V>(xr + i), load<V>(dyr + i), i, dw.v, db.v);
          if (weight != nullptr) {
            store(dweight + i, dw);
            store(dbias + i, db);
          }
        });
    const A mean_u = row_sum(sum) / static_cast<A>(D);
    const A mean_product = row_sum(products) / static_cast<A>(D);
    const auto finish = [&](Pack<T, V> xp, const Pack<T, V>& dyp, int64_t i) {
      Pack<A, V> w = {};
      if (weight != nullptr) w = load<V>(weight + i);
      UNROLL
      for (int j = 0; j < V; ++j) {
        const A g = widen(dyp.v[j]);
        const A xh = (widen(xp.v[j]) - mean) * scale;
        xp.v[j] = narrow<T>((g * w.v[j] + g - mean_u - xh * mean_product) * scale);
      }
      store(dx + r * D + i, xp);
    };
    for_columns<V>(
        D, [&](int k, int64_t i) { finish(xs[k], dys[k], i); },
        [&](int64_t i) { finish(load<V>(xr + i), load<V>(dyr + i), i); });
  }
  if (weight == nullptr) return;
  for_columns<V>(
      D,
      [&](int k, int64_t i) {
        Pack<A, V> dw;
        Pack<A, V> db;
        UNROLL
        for (int j = 0; j < V; ++j) {
          dw.v[j] = held_dweight[k][j];
          db.v[j] = held_dbias[k][j];
        }
        store(dweight + i, dw);
        store(dbias + i, db);
      },
      [](int64_t) {});
}

template <class T, int V>
void forward(const LayerNormForward& args, void* stream) {
  using A = stat_t<T>;
  const RowPlan plan = RowPlan::of(args.D, V);
  launch({"layer_norm_forward", plan.grid(args.R), plan.block(), 0, stream}, layer_norm_forward_kernel<T, V>,
         static_cast<const T*>(args.x), static_cast<const A*>(args.weight), static_cast<const A*>(args.bias),
         static_cast<T*>(args.y), static_cast<A*>(args.mean), static_cast<A*>(args.rstd), args.R, args.D,
         static_cast<A>(args.eps));
}

template <class T, int V>
void backward(const LayerNormBackward& args, void* stream) {
  using A = stat_t<T>;
  const RowPlan plan = RowPlan::of(args.D, V);
  const int64_t parts = args.parts.parts;
  auto* partial = static_cast<A*>(args.workspace);
  launch({"layer_norm_backward", plan.grid(parts), plan.block(), 0, stream}, layer_norm_backward_kernel<T, V>,
         static_cast<const T*>(args.dy), static_cast<const T*>(args.x), static_cast<const A*>(args.weight),
         static_cast<const A*>(args.mean), static_cast<const A*>(args.rstd), static_cast<T*>(args.dx), partial,
         args.parts, args.D);
  if (args.weight == nullptr) return;
  add_parts(partial, parts, args.D, static_cast<A*>(args.dweight), stream);
  add_parts(partial + parts * args.D, parts, args.D, static_cast<A*>(args.dbias), stream);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args, void* stream) {
  if (args.R == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = can_pack<T>(args.D, args.x, args.weight, args.bias, args.y);
    packed ? forward<T, kPackOf<T>>(args, stream) : forward<T, 1>(args, stream);
  });
}

void layer_norm_backward(const LayerNormBackward& args, void* stream) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = can_pack<T>(args.D, args.dy, args.x, args.weight, args.dx, args.workspace);
    packed ? backward<T, kPackOf<T>>(args, stream) : backward<T, 1>(args, stream);
  });
}

}  // namespace megalodon::cuda

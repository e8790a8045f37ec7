// The element types, and the one place that turns a run-time type into a compile-time one.
#pragma once

#include <cstdint>
#include <type_traits>

#include "megalodon.h"

namespace megalodon {

// kOther: what no kernel takes.
enum class DType : int32_t { kFloat32, kBfloat16, kFloat16, kFloat64, kInt64, kInt32, kBool, kByte, kOther };

// Storage of the 16-bit floats: bits only, arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type of parameters, states, statistics and accumulators that go with activations of type T.
template <class T>
using stat_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr DType stat_dtype(DType activation) {
  return activation == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBfloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    default:
      return 1;
  }
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) with the activation type T of `dtype`, which check() has proved to be one of the four.
template <class F>
void visit_activation(DType dtype, F&& f) {
#if defined(__AVX512BF16__)  // these kernels are for bf16 alone (isa.h)
  return f(TypeTag<bf16>{});
#endif
  switch (dtype) {
    case DType::kBfloat16:
      return f(TypeTag<bf16>{});
    case DType::kFloat16:
      return f(TypeTag<f16>{});
    case DType::kFloat64:
      return f(TypeTag<double>{});
    default:
      return f(TypeTag<float>{});
  }
}

// The same for tensors that are float32 or float64 only.
template <class F>
void visit_stat(DType dtype, F&& f) {
  if (dtype == DType::kFloat64) return f(TypeTag<double>{});
  return f(TypeTag<float>{});
}

}  // namespace megalodon

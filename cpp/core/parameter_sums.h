// Gradients of parameters: sums over very many rows of one value per channel. The rows are cut into fixed Parts; a part
// adds up to 256 rows in the accumulator type and these sums in double, and the parts are added in order, in double. So
// the error does not grow with the number of rows, and the result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/simd.h"

namespace megalodon {

// Of the workspace: [parts, n] double, then [parts, n] stat.
static inline int64_t parameter_sums_bytes(int64_t parts, int64_t n, DType stat) {
  return parts * n * (size_of(DType::kFloat64) + size_of(stat));
}

}  // namespace megalodon

namespace megalodon::cpu::MEGALODON_ISA {

// The sums of one part.
template <class A>
class ParameterSums {
 public:
  static constexpr int64_t kRows = 256;  // to be flushed after, at the latest

  ParameterSums(void* workspace, int64_t parts, int64_t n, int64_t part)
      : total_(static_cast<double*>(workspace) + part * n),
        recent_(reinterpret_cast<A*>(static_cast<double*>(workspace) + parts * n) + part * n) {}

  A* recent() const { return recent_; }

  void clear(int64_t begin, int64_t end) {
    if (begin >= end) return;
    std::memset(total_ + begin, 0, (end - begin) * sizeof(double));
    std::memset(recent_ + begin, 0, (end - begin) * sizeof(A));
  }

  void flush(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      total_[i] += static_cast<double>(recent_[i]);
      recent_[i] = 0;
    }
  }

  // out[i] = the sum over the parts at begin + i, for i < count.
  static void add_up(const void* workspace, int64_t parts, int64_t n, int64_t begin, int64_t count, A* out) {
    const double* totals = static_cast<const double*>(workspace) + begin;
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += totals[part * n + i];
      out[i] = static_cast<A>(sum);
    }
  }

 private:
  double* total_;
  A* recent_;
};

}  // namespace megalodon::cpu::MEGALODON_ISA

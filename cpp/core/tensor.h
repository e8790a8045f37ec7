// Tensors at the C boundary: validation of what comes in, description or validation of what goes out.
//
// An op's check() reads its inputs through a Checker, which names op, argument, wanted and got in every message, and
// its outputs through Outputs, which either records what the caller has to allocate or verifies what the caller has
// allocated: the shape of an output is written down once.
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>

#include "core/dtype.h"
#include "core/sequences.h"
#include "megalodon.h"

namespace megalodon {

struct Error {
  megalodon_status status;
  std::string message;
};

// A size with its symbol and where it came from, so that a mismatch can be explained: "D = 512 (x.shape[2])".
struct Dim {
  const char* symbol;
  int64_t size;
  const char* tensor = nullptr;  // nullptr: a plain number
  int axis = 0;
};

// A dimension that may have any size.
constexpr Dim any(const char* symbol) { return Dim{symbol, -1}; }

// A validated view. Absent optional tensors have data == nullptr and ndim == 0.
struct Tensor {
  const char* name = nullptr;
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  const int64_t* shape = nullptr;
  bool present = false;

  Dim dim(int axis, const char* symbol) const { return Dim{symbol, shape[axis], name, axis}; }
  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool overlaps(const Tensor& other) const {  // what has no memory yet overlaps with nothing
    const auto begin = [](const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data); };
    const auto end = [&](const Tensor& tensor) { return begin(tensor) + tensor.count() * size_of(tensor.dtype); };
    return data != nullptr && other.data != nullptr && begin(*this) < end(other) && begin(other) < end(*this);
  }
  int64_t rows() const {  // all dimensions but the last
    int64_t n = 1;
    for (int i = 0; i + 1 < ndim; ++i) n *= shape[i];
    return n;
  }
};

class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  // An activation of any of the four types and exactly these dimensions.
  Tensor activation(const char* name, const DLTensor* tensor, std::initializer_list<Dim> dims);
  // An activation of any shape.
  Tensor elements(const char* name, const DLTensor* tensor);
  // An activation (..., D): at least one dimension.
  Tensor rows(const char* name, const DLTensor* tensor);
  // A tensor of this type and exactly these dimensions.
  Tensor tensor(const char* name, const DLTensor* tensor, DType dtype, std::initializer_list<Dim> dims);
  Tensor tensor(const char* name, const DLTensor* tensor, DType dtype, const int64_t* shape, int ndim);
  // The same, or absent.
  Tensor optional(const char* name, const DLTensor* tensor, DType dtype, std::initializer_list<Dim> dims);
  // A tensor of the type and shape of another one.
  Tensor like(const char* name, const DLTensor* tensor, const Tensor& other);
  // A float32 or float64 tensor where no activation decides which.
  Tensor stat(const char* name, const DLTensor* tensor, std::initializer_list<Dim> dims);

  // Throws a value error unless `holds`: "{op}: {name} must be {wanted}; got {got}".
  void require(bool holds, const char* name, const std::string& wanted, const std::string& got) const {
    if (!holds) fail(MEGALODON_VALUE_ERROR, name, wanted, got);
  }
  void at_least(const char* name, int64_t value, int64_t least) const;
  // Also finite, and both as a number of type `as`, which the kernel makes of it.
  void positive(const char* name, double value, DType as = DType::kFloat64) const;
  // The elements of an int64 tensor, which are data: read on the CPU alone. nullptr is right.
  void not_negative(const char* name, const int64_t* values, int64_t count) const;
  // That what is written shares memory with nothing else: with none of `written`, none of `read`.
  void apart(std::initializer_list<Tensor> written, std::initializer_list<Tensor> read) const;
  // The sequences of x (B, L, ...), or (1, T, ...) with the optional cu_seqlens (segments + 1) int32 or int64. Their
  // values are read on the CPU alone.
  Sequences sequences(const Tensor& x, const DLTensor* cu_seqlens);
  // How many they are, for the rows of states: B or segments.
  static Dim rows_of(const Tensor& x, const Sequences& sequences) {
    return sequences.packed ? Dim{"segments", sequences.count} : x.dim(0, "B");
  }

  [[noreturn]] void fail(megalodon_status status, const char* name, const std::string& wanted,
                         const std::string& got) const;
  [[noreturn]] void not_implemented(const std::string& what) const;

  const char* op() const { return op_; }
  DLDevice device() const { return device_; }
  // Whether the CUDA kernel runs, which may want another workspace.
  bool on_cuda() const {
#if defined(MEGALODON_SIMT)
    return true;
#else
    return device_.device_type != kDLCPU;
#endif
  }

 private:
  friend class Outputs;
  Tensor view(const char* name, const DLTensor* tensor);
  void match(const Tensor& tensor, std::initializer_list<Dim> dims) const;

  const char* op_;
  const char* first_ = nullptr;  // the tensor whose device the others must share
  DLDevice device_{kDLCPU, 0};
};

// The outputs of one call, taken in the order of the C function's arguments.
class Outputs {
 public:
  explicit Outputs(megalodon_spec* specs) : specs_(specs) {}
  Outputs(std::initializer_list<DLTensor*> tensors) {
    for (DLTensor* tensor : tensors) tensors_[count_++] = tensor;
  }

  // The next output's memory (nullptr while recording).
  void* next(Checker& checker, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
    return next(checker, name, dtype, shape.begin(), static_cast<int>(shape.size()));
  }
  void* next(Checker& checker, const char* name, DType dtype, const int64_t* shape, int ndim);
  void* like(Checker& checker, const char* name, const Tensor& input) {
    return next(checker, name, input.dtype, input.shape, input.ndim);
  }
  // The gradient of an optional input: like it, or [0].
  void* gradient(Checker& checker, const char* name, const Tensor& input, DType dtype) {
    if (input.present) return like(checker, name, input);
    return next(checker, name, dtype, {0});
  }
  void* workspace(Checker& checker, int64_t bytes) { return next(checker, "workspace", DType::kByte, {bytes}); }

 private:
  megalodon_spec* specs_ = nullptr;
  DLTensor* tensors_[12] = {};
  Tensor given_[12];
  int count_ = 0;
  int index_ = 0;
};

// Runs `body` for a C function: exceptions become a status and a message.
int record_error(const Error& error);
int record_unknown_error(const char* what);
template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return MEGALODON_OK;
  } catch (const Error& error) {
    return record_error(error);
  } catch (const std::exception& error) {
    return record_unknown_error(error.what());
  }
}

#if defined(MEGALODON_WITH_CUDA)
// Makes the device current on this thread while it lives (cuda/core/device.cu).
class DeviceGuard {
 public:
  DeviceGuard(const Checker& checker, int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  int device_;
};
#endif

// Where a checked call runs: the CPU kernel or the CUDA launcher, which is nullptr where cuda/ops has none. The build
// for the executor (cuda/simt) runs the CUDA launcher on CPU tensors.
template <class Args>
void run_on(const Checker& checker, const Args& args, void (*cpu)(const Args&), void (*cuda)(const Args&, void* stream),
            void* stream) {
  if (!checker.on_cuda()) return cpu(args);
#if defined(MEGALODON_WITH_CUDA) || defined(MEGALODON_SIMT)
  if (cuda == nullptr) checker.not_implemented("a CUDA kernel");
#if defined(MEGALODON_WITH_CUDA)
  const DeviceGuard guard(checker, checker.device().device_id);
#endif
  cuda(args, stream);
#else
  (void)cuda, (void)stream;
  throw Error{MEGALODON_RUNTIME_ERROR,
              std::string(checker.op()) + ": the tensors are on a CUDA device, and this build has no CUDA kernels"};
#endif
}

}  // namespace megalodon

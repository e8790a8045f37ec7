#include "core/tensor.h"

#include <cmath>
#include <cstdio>
#include <exception>

namespace megalodon {
namespace {

thread_local std::string last_error;

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string device_text(DLDevice device) {
  if (device.device_type == kDLCPU) return "cpu";
  const std::string kind = device.device_type == kDLCUDA ? "cuda" : "device type " + std::to_string(device.device_type);
  return kind + ":" + std::to_string(device.device_id);
}

const char* dtype_text(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64", "int64", "int32", "bool", "uint8"};
  return kNames[static_cast<int>(dtype)];
}

std::string dtype_text(DLDataType dtype) {
  const char* kind = "type";
  switch (dtype.code) {
    case kDLInt:
      kind = "int";
      break;
    case kDLUInt:
      kind = "uint";
      break;
    case kDLFloat:
      kind = "float";
      break;
    case kDLBfloat:
      kind = "bfloat";
      break;
    case kDLComplex:
      kind = "complex";
      break;
    case kDLBool:
      return "bool";
    default:  // float8, float6 and float4 in their variants
      if (dtype.code > kDLBool) kind = "float";
      break;
  }
  return kind + std::to_string(dtype.bits) + (dtype.lanes > 1 ? "x" + std::to_string(dtype.lanes) : "");
}

DLDataType to_dlpack(DType dtype) {
  const auto bits = static_cast<uint8_t>(8 * size_of(dtype));
  switch (dtype) {
    case DType::kBfloat16:
      return {kDLBfloat, bits, 1};
    case DType::kInt64:
    case DType::kInt32:
      return {kDLInt, bits, 1};
    case DType::kBool:
      return {kDLBool, bits, 1};
    case DType::kByte:
      return {kDLUInt, bits, 1};
    default:
      return {kDLFloat, bits, 1};
  }
}

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

bool is_activation(DType dtype) { return dtype <= DType::kFloat64; }

constexpr const char* kActivationTypes = "float32, bfloat16, float16 or float64";

// "[B, L, D] with B = 2 (x.shape[0]), D = 512 (x.shape[2])"
std::string dims_text(std::initializer_list<Dim> dims) {
  std::string text = "[";
  std::string where;
  const char* separator = "";
  for (const Dim& dim : dims) {
    text += separator;
    text += dim.symbol;
    separator = ", ";
    const bool is_number = dim.symbol[0] >= '0' && dim.symbol[0] <= '9';
    if (dim.size < 0 || is_number) continue;
    where += (where.empty() ? " with " : ", ") + std::string(dim.symbol) + " = " + std::to_string(dim.size);
    if (dim.tensor != nullptr) where += " (" + std::string(dim.tensor) + ".shape[" + std::to_string(dim.axis) + "])";
  }
  return text + "]" + where;
}

}  // namespace

int record_error(const Error& error) {
  last_error = error.message;
  return error.status;
}

int record_unknown_error(const char* what) {
  last_error = what;
  return MEGALODON_RUNTIME_ERROR;
}

void Checker::fail(megalodon_status status, const char* name, const std::string& wanted, const std::string& got) const {
  throw Error{status, std::string(op_) + ": " + name + " must be " + wanted + "; got " + got};
}

void Checker::not_implemented(const std::string& what) const {
  throw Error{MEGALODON_NOT_IMPLEMENTED, std::string(op_) + ": " + what + " is not implemented yet"};
}

Tensor Checker::view(const char* name, const DLTensor* tensor) {
  if (tensor == nullptr) fail(MEGALODON_TYPE_ERROR, name, "a tensor", "none");
  if (tensor->ndim > MEGALODON_MAX_NDIM) {
    fail(MEGALODON_VALUE_ERROR, name, "of at most " + std::to_string(MEGALODON_MAX_NDIM) + " dimensions",
         std::to_string(tensor->ndim));
  }
  Tensor out;
  out.name = name;
  out.ndim = tensor->ndim;
  out.shape = tensor->shape;
  out.present = true;
  out.data = static_cast<char*>(tensor->data) + tensor->byte_offset;

  out.dtype = DType::kOther;
  for (DType dtype : {DType::kFloat32, DType::kBfloat16, DType::kFloat16, DType::kFloat64, DType::kInt64, DType::kInt32,
                      DType::kBool, DType::kByte}) {
    if (same(tensor->dtype, to_dlpack(dtype))) {
      out.dtype = dtype;
      break;
    }
  }

  const bool on_host = tensor->device.device_type == kDLCPU;
  if (!on_host && tensor->device.device_type != kDLCUDA) {
    fail(MEGALODON_VALUE_ERROR, name, "on the CPU or a CUDA device", device_text(tensor->device));
  }
  if (first_ == nullptr) {
    first_ = name;
    device_ = tensor->device;
  } else if (tensor->device.device_type != device_.device_type ||
             (!on_host && tensor->device.device_id != device_.device_id)) {
    fail(MEGALODON_VALUE_ERROR, name, "on " + device_text(device_) + " like " + first_, device_text(tensor->device));
  }

  if (tensor->strides != nullptr && out.count() > 1) {
    int64_t compact = 1;
    for (int i = tensor->ndim - 1; i >= 0; --i) {
      if (tensor->shape[i] != 1 && tensor->strides[i] != compact) {
        fail(MEGALODON_VALUE_ERROR, name, "contiguous (row-major)",
             "shape " + shape_text(tensor->shape, tensor->ndim) + ", strides " +
                 shape_text(tensor->strides, tensor->ndim));
      }
      compact *= tensor->shape[i];
    }
  }
  return out;
}

void Checker::match(const Tensor& tensor, std::initializer_list<Dim> dims) const {
  bool matches = tensor.ndim == static_cast<int>(dims.size());
  int axis = 0;
  for (const Dim& dim : dims) {
    matches = matches && (dim.size < 0 || tensor.shape[axis] == dim.size);
    ++axis;
  }
  if (!matches) fail(MEGALODON_VALUE_ERROR, tensor.name, dims_text(dims), shape_text(tensor.shape, tensor.ndim));
}

Tensor Checker::activation(const char* name, const DLTensor* tensor, std::initializer_list<Dim> dims) {
  const Tensor out = view(name, tensor);
  if (!is_activation(out.dtype)) fail(MEGALODON_TYPE_ERROR, name, kActivationTypes, dtype_text(tensor->dtype));
  match(out, dims);
  return out;
}

Tensor Checker::elements(const char* name, const DLTensor* tensor) {
  const Tensor out = view(name, tensor);
  if (!is_activation(out.dtype)) fail(MEGALODON_TYPE_ERROR, name, kActivationTypes, dtype_text(tensor->dtype));
  return out;
}

Tensor Checker::rows(const char* name, const DLTensor* tensor) {
  const Tensor out = elements(name, tensor);
  require(out.ndim >= 1, name, "[..., D]", "[]");
  return out;
}

Tensor Checker::tensor(const char* name, const DLTensor* tensor, DType dtype, std::initializer_list<Dim> dims) {
  const Tensor out = view(name, tensor);
  if (out.dtype != dtype) fail(MEGALODON_TYPE_ERROR, name, dtype_text(dtype), dtype_text(tensor->dtype));
  match(out, dims);
  return out;
}

Tensor Checker::tensor(const char* name, const DLTensor* tensor, DType dtype, const int64_t* shape, int ndim) {
  const Tensor out = view(name, tensor);
  if (out.dtype != dtype) fail(MEGALODON_TYPE_ERROR, name, dtype_text(dtype), dtype_text(tensor->dtype));
  bool matches = out.ndim == ndim;
  for (int i = 0; matches && i < ndim; ++i) matches = out.shape[i] == shape[i];
  require(matches, name, shape_text(shape, ndim), shape_text(out.shape, out.ndim));
  return out;
}

Tensor Checker::optional(const char* name, const DLTensor* given, DType dtype, std::initializer_list<Dim> dims) {
  if (given != nullptr) return tensor(name, given, dtype, dims);
  Tensor absent;
  absent.name = name;
  absent.dtype = dtype;
  return absent;
}

Tensor Checker::like(const char* name, const DLTensor* tensor, const Tensor& other) {
  const Tensor out = view(name, tensor);
  if (out.dtype != other.dtype) {
    fail(MEGALODON_TYPE_ERROR, name, std::string(dtype_text(other.dtype)) + " like " + other.name,
         dtype_text(tensor->dtype));
  }
  bool matches = out.ndim == other.ndim;
  for (int i = 0; matches && i < out.ndim; ++i) matches = out.shape[i] == other.shape[i];
  if (!matches) {
    fail(MEGALODON_VALUE_ERROR, name, shape_text(other.shape, other.ndim) + " like " + other.name,
         shape_text(out.shape, out.ndim));
  }
  return out;
}

Tensor Checker::stat(const char* name, const DLTensor* tensor, std::initializer_list<Dim> dims) {
  const Tensor out = view(name, tensor);
  if (out.dtype != DType::kFloat32 && out.dtype != DType::kFloat64) {
    fail(MEGALODON_TYPE_ERROR, name, "float32 or float64", dtype_text(tensor->dtype));
  }
  match(out, dims);
  return out;
}

void Checker::at_least(const char* name, int64_t value, int64_t least) const {
  if (value < least) fail(MEGALODON_VALUE_ERROR, name, "at least " + std::to_string(least), std::to_string(value));
}

void Checker::positive(const char* name, double value, DType as) const {
  const auto holds = [](double number) { return number > 0 && std::isfinite(number); };
  if (holds(as == DType::kFloat64 ? value : static_cast<float>(value))) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  fail(MEGALODON_VALUE_ERROR, name, holds(value) ? "positive and finite in float32" : "positive and finite", text);
}

void Checker::not_negative(const char* name, const int64_t* values, int64_t count) const {
  if (values == nullptr || device_.device_type != kDLCPU) return;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= 0) continue;
    fail(MEGALODON_VALUE_ERROR, name, "at least 0 everywhere",
         std::to_string(values[i]) + " at [" + std::to_string(i) + "]");
  }
}

void Checker::apart(std::initializer_list<Tensor> written, std::initializer_list<Tensor> read) const {
  const auto check = [&](const Tensor& a, const Tensor& b) {
    if (!a.overlaps(b)) return;
    fail(MEGALODON_VALUE_ERROR, b.name, std::string("apart in memory from ") + a.name + ", which is written to",
         "an overlap");
  };
  for (const Tensor& a : written) {
    for (const Tensor* b = &a + 1; b != written.end(); ++b) check(a, *b);
    for (const Tensor& b : read) check(a, b);
  }
}

Sequences Checker::sequences(const Tensor& x, const DLTensor* cu_seqlens) {
  if (cu_seqlens == nullptr) return Sequences::of_rows(x.shape[0], x.shape[1]);
  const Tensor ends = view("cu_seqlens", cu_seqlens);
  if (ends.dtype != DType::kInt32 && ends.dtype != DType::kInt64) {
    fail(MEGALODON_TYPE_ERROR, ends.name, "int32 or int64", dtype_text(cu_seqlens->dtype));
  }
  require(ends.ndim == 1 && ends.shape[0] >= 2, ends.name, "[segments + 1] with at least one segment",
          shape_text(ends.shape, ends.ndim));
  require(x.shape[0] == 1, x.name, "one packed row, [1, T, ...], where cu_seqlens is given",
          shape_text(x.shape, x.ndim));
  const int64_t T = x.shape[1];
  const Sequences sequences{ends.shape[0] - 1, T, ends.data, ends.dtype == DType::kInt64, true};
  if (ends.data == nullptr || device_.device_type != kDLCPU) return sequences;
  const auto at = [&](int64_t i) {
    return sequences.is_int64 ? static_cast<const int64_t*>(ends.data)[i] : static_cast<const int32_t*>(ends.data)[i];
  };
  require(at(0) == 0, ends.name, "0 at first", std::to_string(at(0)));
  for (int64_t i = 1; i <= sequences.count; ++i) {
    if (at(i) >= at(i - 1)) continue;  // no text is made of what is right: there may be thousands
    fail(MEGALODON_VALUE_ERROR, ends.name, "ascending",
         std::to_string(at(i)) + " after " + std::to_string(at(i - 1)) + " at [" + std::to_string(i) + "]");
  }
  require(at(sequences.count) == T, ends.name, "T = " + std::to_string(T) + " (" + x.name + ".shape[1]) at last",
          std::to_string(at(sequences.count)));
  return sequences;
}

void* Outputs::next(Checker& checker, const char* name, DType dtype, const int64_t* shape, int ndim) {
  if (specs_ != nullptr) {
    megalodon_spec& spec = specs_[index_++];
    spec.dtype = to_dlpack(dtype);
    spec.ndim = ndim;
    for (int i = 0; i < ndim; ++i) spec.shape[i] = shape[i];
    return nullptr;
  }
  const DLTensor* tensor = index_ < count_ ? tensors_[index_] : nullptr;
  const Tensor given = checker.view(name, tensor);
  for (int i = 0; i < index_; ++i) checker.apart({given_[i], given}, {});
  given_[index_++] = given;
  if (given.dtype != dtype) checker.fail(MEGALODON_TYPE_ERROR, name, dtype_text(dtype), dtype_text(tensor->dtype));
  bool matches = given.ndim == ndim;
  for (int i = 0; matches && i < ndim; ++i) matches = given.shape[i] == shape[i];
  checker.require(matches, name, shape_text(shape, ndim), shape_text(given.shape, given.ndim));
  return given.data;
}

}  // namespace megalodon

extern "C" const char* megalodon_last_error(void) { return megalodon::last_error.c_str(); }
extern "C" const char* megalodon_cuda_version(void) {
#if defined(MEGALODON_CUDA_VERSION)
  return MEGALODON_CUDA_VERSION;
#else
  return "";
#endif
}
extern "C" const char* megalodon_version(void) { return MEGALODON_VERSION; }

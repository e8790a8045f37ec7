#include "bind/borrow.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace megalodon::bind {
namespace {

// The part of the DLPack ABI (version 1) that megalodon.h does not need.
struct Version {
  uint32_t major, minor;
};
struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};
struct ManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
constexpr uint64_t kReadOnly = 1;
struct ExchangeTable {
  Version version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__qualname__")); }

// torch, once something else has imported it; this module never does.
py::handle torch_module() {
  static PyObject* torch = nullptr;
  if (torch == nullptr) {
    torch = PyDict_GetItemString(PyImport_GetModuleDict(), "torch");
    Py_XINCREF(torch);
  }
  return torch;
}

bool is_torch_tensor(py::handle object) {
  static PyObject* tensor_type = nullptr;
  static PyObject* parameter_type = nullptr;
  if (tensor_type == nullptr) {
    const py::handle torch = torch_module();
    if (!torch || !py::hasattr(torch, "Tensor") || !py::hasattr(torch, "nn")) return false;
    tensor_type = py::object(torch.attr("Tensor")).release().ptr();
    parameter_type = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
  }
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == tensor_type || type == parameter_type || PyObject_IsInstance(object.ptr(), tensor_type) == 1;
}

// nullptr where this torch has no table of version 1 (it goes through __dlpack__ then).
const ExchangeTable* torch_table() {
  static const ExchangeTable* table = []() -> const ExchangeTable* {
    const py::object type = torch_module().attr("Tensor");
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    auto* found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
    return found->version.major == 1 && found->tensor_from_py_object != nullptr ? found : nullptr;
  }();
  return table;
}

// The attribute that names this type in torch, NumPy and CuPy alike.
const char* dtype_attribute(DLDataType dtype) {
  if (dtype.code == kDLBool) return "bool_";
  if (dtype.code == kDLBfloat) return "bfloat16";
  if (dtype.code == kDLInt) return dtype.bits == 64 ? "int64" : "int32";
  if (dtype.code == kDLUInt) return "uint8";
  return dtype.bits == 64 ? "float64" : dtype.bits == 32 ? "float32" : "float16";
}

bool is_cupy(py::handle object) {
  const auto module = py::str(py::type::handle_of(object).attr("__module__")).cast<std::string>();
  return module == "cupy" || module.rfind("cupy.", 0) == 0;
}

bool is_on_cuda(py::handle object) {
  if (!py::hasattr(object, "__dlpack_device__")) return false;
  return object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>() == kDLCUDA;
}

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits; }

py::tuple shape_tuple(const megalodon_spec& spec) {
  py::tuple shape(spec.ndim);
  for (int i = 0; i < spec.ndim; ++i) shape[i] = spec.shape[i];
  return shape;
}

}  // namespace

Borrowed::~Borrowed() = default;

void Borrowed::borrow(py::handle object, bool written) {
  if (object.is_none()) return;
  if (is_torch_tensor(object)) {
    family_ = Family::kTorch;
    if (torch_table() != nullptr) {
      from_torch(object);
    } else {
      from_dlpack(object.attr("detach")(), written);
    }
    if (!written && !is_contiguous()) from_torch(object_.attr("contiguous")());
  } else if (py::isinstance<py::array>(object)) {
    family_ = Family::kNumpy;
    from_numpy(object, written);
    if (!written && !is_contiguous()) {
      from_numpy(py::module_::import("numpy").attr("ascontiguousarray")(object), written);
    }
  } else if (py::hasattr(object, "__dlpack__")) {
    family_ = Family::kOther;
    from_dlpack(object, written);
    if (!written && !is_contiguous()) {
      throw py::value_error("a " + type_name(object) + " must be contiguous (row-major)");
    }
  } else {
    throw py::type_error("expected an array (torch.Tensor, numpy.ndarray or an object with __dlpack__); got " +
                         type_name(object));
  }
  if (tensor_.data == nullptr && !is_empty()) {
    throw py::value_error("a " + type_name(object) + " must have memory; got one without");
  }
}

bool Borrowed::is_empty() const {
  return std::any_of(tensor_.shape, tensor_.shape + tensor_.ndim, [](int64_t size) { return size == 0; });
}

bool Borrowed::is_contiguous() const {
  if (tensor_.strides == nullptr) return true;
  int64_t compact = 1;
  for (int i = tensor_.ndim - 1; i >= 0; --i) {
    if (tensor_.shape[i] == 0) return true;
    if (tensor_.shape[i] != 1 && tensor_.strides[i] != compact) return false;
    compact *= tensor_.shape[i];
  }
  return true;
}

void Borrowed::from_torch(py::handle object) {
  object_ = py::reinterpret_borrow<py::object>(object);
  if (torch_table() == nullptr) return from_dlpack(object, false);
  if (torch_table()->tensor_from_py_object(object.ptr(), &tensor_) != 0) throw py::error_already_set();
}

void Borrowed::from_numpy(py::handle object, bool written) {
  object_ = py::reinterpret_borrow<py::object>(object);
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (array.ndim() > MEGALODON_MAX_NDIM) {
    throw py::value_error("an array must have at most 8 dimensions; got " + std::to_string(array.ndim()));
  }
  if (written && !array.writeable()) throw py::value_error("an array that is written to must be writeable");
  // Elements that lie askew, or strides that are no whole numbers of elements: columns of structured arrays have them.
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    if (written) throw py::value_error("an array that is written to must be aligned to its elements");
    return from_numpy(py::module_::import("numpy").attr("require")(object, py::none(), "CA"), written);
  }
  const py::dtype dtype = array.dtype();
  const auto bits = static_cast<uint8_t>(8 * dtype.itemsize());
  switch (dtype.kind()) {
    case 'f':
      tensor_.dtype = {kDLFloat, bits, 1};
      break;
    case 'i':
      tensor_.dtype = {kDLInt, bits, 1};
      break;
    case 'u':
      tensor_.dtype = {kDLUInt, bits, 1};
      break;
    case 'b':
      tensor_.dtype = {kDLBool, bits, 1};
      break;
    case 'c':
      tensor_.dtype = {kDLComplex, bits, 1};
      break;
    default:
      if (std::string(py::str(dtype.attr("name"))) == "bfloat16") {  // of the ml_dtypes package
        tensor_.dtype = {kDLBfloat, 16, 1};
        break;
      }
      throw py::type_error("an array must have a numeric dtype; got " + std::string(py::str(dtype)));
  }
  if (dtype.byteorder() == '>')
    throw py::type_error("an array must be of native byte order; got " + std::string(py::str(dtype)));
  tensor_.data = const_cast<void*>(array.data());
  tensor_.device = {kDLCPU, 0};
  tensor_.ndim = static_cast<int32_t>(array.ndim());
  for (int i = 0; i < tensor_.ndim; ++i) {
    shape_[i] = array.shape(i);
    strides_[i] = dtype.itemsize() > 0 ? array.strides(i) / dtype.itemsize() : 0;
  }
  tensor_.shape = shape_;
  tensor_.strides = strides_;
  tensor_.byte_offset = 0;
}

void Borrowed::from_dlpack(py::handle object, bool written) {
  object_ = py::reinterpret_borrow<py::object>(object);
  py::dict keywords;
  if (is_on_cuda(object)) {
    // -1: nothing to wait for, since the kernel follows on the owner's own stream. An unknown owner is asked to have
    // its work done before what comes on the legacy default stream, 1.
    const bool follows = family_ == Family::kTorch || is_cupy(object);
    keywords["stream"] = follows ? -1 : 1;
  }
  try {
    capsule_ = object.attr("__dlpack__")(**keywords, py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule_ = object.attr("__dlpack__")(**keywords);  // a producer from before max_version
  }
  // The capsule keeps its name, so its own destructor releases the tensor when we drop it.
  if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
    if (written && (managed->flags & kReadOnly) != 0) {
      throw py::value_error("an array that is written to must be writeable");
    }
    tensor_ = managed->tensor;
  } else if (auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))) {
    tensor_ = managed->tensor;
  } else {
    throw py::error_already_set();
  }
}

void* Borrowed::stream() const {
  if (!object_ || tensor_.device.device_type != kDLCUDA) return nullptr;
  if (family_ == Family::kTorch && torch_table() != nullptr) {
    void* stream = nullptr;
    if (torch_table()->current_work_stream(tensor_.device.device_type, tensor_.device.device_id, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  const bool is_torch = family_ == Family::kTorch;
  if (!is_torch && !is_cupy(object_)) return nullptr;  // the legacy default stream, as from_dlpack has asked for
  const py::module_ owner = py::module_::import(is_torch ? "torch.cuda" : "cupy.cuda");
  const py::object stream = owner.attr(is_torch ? "current_stream" : "get_current_stream")(tensor_.device.device_id);
  return reinterpret_cast<void*>(stream.attr(is_torch ? "cuda_stream" : "ptr").cast<uintptr_t>());
}

namespace {

// empty_like and new_empty are the cheapest of torch's allocations from Python: most of a small call's time is here.
py::object allocate_torch(py::handle like, bool like_dtype, bool like_shape, const megalodon_spec& spec) {
  static const py::handle empty_like = py::object(torch_module().attr("empty_like")).release();
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  static PyObject* const keywords = py::make_tuple("dtype").release().ptr();
  PyObject* made = nullptr;
  if (like_dtype && like_shape) {
    made = PyObject_CallOneArg(empty_like.ptr(), like.ptr());
  } else {
    const py::tuple shape = shape_tuple(spec);
    py::object dtype;
    if (!like_dtype) dtype = torch_module().attr(spec.dtype.code == kDLBool ? "bool" : dtype_attribute(spec.dtype));
    PyObject* arguments[] = {like.ptr(), shape.ptr(), dtype.ptr()};
    made = PyObject_VectorcallMethod(new_empty, arguments, 2, like_dtype ? nullptr : keywords);
  }
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// Allocates the outputs that go with a GPU array of any library but torch.
py::module_ cupy(const Borrowed& like) {
  try {
    return py::module_::import("cupy");
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    const std::string owner = type_name(like.object());
    throw py::value_error("a " + owner +
                          " on a GPU needs CuPy, to allocate outputs and workspaces: install cupy-cuda13x");
  }
}

bool same_shape(const DLTensor& tensor, const megalodon_spec& spec) {
  return tensor.ndim == spec.ndim && std::equal(spec.shape, spec.shape + spec.ndim, tensor.shape);
}

}  // namespace

py::object allocate(const Borrowed& like, const megalodon_spec& spec) {
  const DLTensor& tensor = *const_cast<Borrowed&>(like).tensor();
  const bool like_dtype = same(spec.dtype, tensor.dtype);
  if (like.family() == Family::kTorch) {
    return allocate_torch(like.object(), like_dtype, same_shape(tensor, spec), spec);
  }
  const bool on_host = tensor.device.device_type == kDLCPU;
  const py::module_ library = on_host ? py::module_::import("numpy") : cupy(like);
  const py::object dtype = like_dtype && py::hasattr(like.object(), "dtype")
                               ? py::object(like.object().attr("dtype"))
                               : library.attr(dtype_attribute(spec.dtype));
  if (on_host) return library.attr("empty")(shape_tuple(spec), dtype);
  const py::object device = library.attr("cuda").attr("Device")(tensor.device.device_id);
  device.attr("__enter__")();
  py::object made;
  try {
    made = library.attr("empty")(shape_tuple(spec), dtype);
  } catch (...) {
    device.attr("__exit__")(py::none(), py::none(), py::none());
    throw;
  }
  device.attr("__exit__")(py::none(), py::none(), py::none());
  return made;
}

}  // namespace megalodon::bind

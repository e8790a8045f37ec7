// The Python extension module: every C function as a Python function, one line each.
//
// A kernel function takes its inputs, then optionally `out`, a tuple of arrays to write to; without it the outputs are
// allocated by the library the first array came from (torch, NumPy, CuPy). It returns the tuple of outputs. Workspaces
// (outputs of type uint8) are allocated and dropped here.
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "bind/borrow.h"
#include "megalodon.h"

namespace megalodon::bind {
namespace {

[[noreturn]] void throw_last_error(int status) {
  PyObject* type = status == MEGALODON_VALUE_ERROR       ? PyExc_ValueError
                   : status == MEGALODON_TYPE_ERROR      ? PyExc_TypeError
                   : status == MEGALODON_NOT_IMPLEMENTED ? PyExc_NotImplementedError
                                                         : PyExc_RuntimeError;
  PyErr_SetString(type, megalodon_last_error());
  throw py::error_already_set();
}

void throw_unless_ok(int status) {
  if (status != MEGALODON_OK) throw_last_error(status);
}

[[noreturn]] void throw_wrong_scalar(py::handle object, const char* wanted) {
  PyErr_Clear();
  throw py::type_error(std::string("expected ") + wanted + "; got " + std::string(py::str(py::repr(object))));
}

// Runs `body`, whose errors know no op.
template <class Body>
void naming(const char* name, Body&& body) {
  try {
    body();
  } catch (const py::type_error& error) {
    throw py::type_error(std::string(name) + ": " + error.what());
  } catch (const py::value_error& error) {
    throw py::value_error(std::string(name) + ": " + error.what());
  }
}

// How one C argument is read from Python.
template <class T>
struct Argument {
  T value{};
  void read(py::handle object) {
    if constexpr (std::is_same_v<T, int64_t>) {
      value = PyLong_AsLongLong(object.ptr());
      if (value == -1 && PyErr_Occurred()) throw_wrong_scalar(object, "an int of at most 64 bits");
    } else if constexpr (std::is_same_v<T, double>) {
      value = PyFloat_AsDouble(object.ptr());
      if (value == -1.0 && PyErr_Occurred()) throw_wrong_scalar(object, "a number");
    } else {
      static_assert(std::is_same_v<T, const char*>);
      value = PyUnicode_Check(object.ptr()) ? PyUnicode_AsUTF8(object.ptr()) : nullptr;
      if (value == nullptr) throw_wrong_scalar(object, "a string");
    }
  }
  T get() { return value; }
  Borrowed* array() { return nullptr; }
};

template <class Pointer>
struct ArrayArgument {
  Borrowed borrowed;
  void read(py::handle object) { borrowed.borrow(object, std::is_same_v<Pointer, DLTensor*>); }
  Pointer get() { return borrowed.tensor(); }
  Borrowed* array() { return borrowed.tensor() == nullptr ? nullptr : &borrowed; }
};
template <>
struct Argument<const DLTensor*> : ArrayArgument<const DLTensor*> {};
template <>
struct Argument<DLTensor*> : ArrayArgument<DLTensor*> {};

template <class Specs, class Run>
struct Call;

// Specs: int(inputs..., megalodon_spec*). Run: int(inputs..., DLTensor* outputs..., void* stream).
template <class... S, class... R>
struct Call<int (*)(S...), int (*)(R...)> {
  static constexpr size_t kInputs = sizeof...(S) - 1;
  static constexpr size_t kOutputs = sizeof...(R) - sizeof...(S);
  using InputTypes = std::tuple<S...>;

  template <size_t... I, size_t... O>
  static py::object call(const char* name, int (*specs_of)(S...), int (*run)(R...), const py::args& given,
                         std::index_sequence<I...>, std::index_sequence<O...>) {
    if (given.size() != kInputs && given.size() != kInputs + 1) {
      throw py::type_error(std::string(name) + ": takes " + std::to_string(kInputs) +
                           " inputs and optionally out; got " + std::to_string(given.size()) + " arguments");
    }
    std::tuple<Argument<std::tuple_element_t<I, InputTypes>>...> inputs;
    naming(name, [&] { (std::get<I>(inputs).read(PyTuple_GET_ITEM(given.ptr(), I)), ...); });

    std::array<megalodon_spec, kOutputs> specs;
    throw_unless_ok(specs_of(std::get<I>(inputs).get()..., specs.data()));

    Borrowed* like = nullptr;
    ((like = like != nullptr ? like : std::get<I>(inputs).array()), ...);
    std::array<py::object, kOutputs> outputs;
    std::array<Borrowed, kOutputs> borrowed;
    const py::object out = given.size() > kInputs ? py::object(given[kInputs]) : py::none();
    size_t results = 0;
    for (size_t i = 0; i < kOutputs; ++i) results += !is_workspace(specs[i]);
    if (!out.is_none()) {
      if (!py::isinstance<py::tuple>(out) || py::len(out) != results) {
        throw py::type_error(std::string(name) + ": out must be a tuple of " + std::to_string(results) + " arrays");
      }
    }
    for (size_t i = 0; i < kOutputs; ++i) {
      const bool given_out = !out.is_none() && !is_workspace(specs[i]);
      outputs[i] = given_out ? py::object(py::reinterpret_borrow<py::tuple>(out)[i]) : allocate(*like, specs[i]);
      naming(name, [&] { borrowed[i].borrow(outputs[i], true); });
    }

    void* stream = like->stream();
    int status;
    {
      py::gil_scoped_release release;
      status = run(std::get<I>(inputs).get()..., borrowed[O].tensor()..., stream);
    }
    throw_unless_ok(status);
    if (results == 1) return outputs[0];
    py::tuple result(results);
    for (size_t i = 0; i < results; ++i) result[i] = outputs[i];
    return result;
  }

  static bool is_workspace(const megalodon_spec& spec) { return spec.dtype.code == kDLUInt && spec.dtype.bits == 8; }
};

template <class Specs, class Run>
void define(py::module_& module, const char* name, Specs specs_of, Run run) {
  using C = Call<Specs, Run>;
  module.def(name, [=](const py::args& given) {
    if (run == nullptr) {
      PyErr_Format(PyExc_NotImplementedError, "%s: not in this build (see MEGALODON_OPS)", name);
      throw py::error_already_set();
    }
    return C::call(name, specs_of, run, given, std::make_index_sequence<C::kInputs>{},
                   std::make_index_sequence<C::kOutputs>{});
  });
}

// A build of some ops (MEGALODON_OPS) has no functions of the others: weak, their addresses are null.
#define MEGALODON_PRAGMA(text) _Pragma(#text)
#define MEGALODON_DEFINE(name)                      \
  MEGALODON_PRAGMA(weak megalodon_##name##_outputs) \
  MEGALODON_PRAGMA(weak megalodon_##name)           \
  define(module, #name, megalodon_##name##_outputs, megalodon_##name)

PYBIND11_MODULE(_C, module) {
  MEGALODON_DEFINE(block_step_forward);
  MEGALODON_DEFINE(cema_forward);
  MEGALODON_DEFINE(cema_backward);
  MEGALODON_DEFINE(cema_kernel_forward);
  MEGALODON_DEFINE(cema_kernel_backward);
  MEGALODON_DEFINE(chunk_attention_forward);
  MEGALODON_DEFINE(chunk_attention_backward);
  MEGALODON_DEFINE(chunk_attention_step_forward);
  MEGALODON_DEFINE(fft_conv_forward);
  MEGALODON_DEFINE(fft_conv_backward);
  MEGALODON_DEFINE(layer_norm_forward);
  MEGALODON_DEFINE(layer_norm_backward);
  MEGALODON_DEFINE(linear_step_forward);
  MEGALODON_DEFINE(qk_norm_rope_forward);
  MEGALODON_DEFINE(qk_norm_rope_backward);
  MEGALODON_DEFINE(rms_norm_forward);
  MEGALODON_DEFINE(rms_norm_backward);
  MEGALODON_DEFINE(silu_mul_forward);
  MEGALODON_DEFINE(silu_mul_backward);
  MEGALODON_DEFINE(timestep_norm_forward);
  MEGALODON_DEFINE(timestep_norm_backward);

  module.def("version", [] { return megalodon_version(); });
  module.def("cuda_version", [] { return megalodon_cuda_version(); });
  module.def("isa", [] { return megalodon_isa(); });
  module.def("set_isa", [](const char* name) { throw_unless_ok(megalodon_set_isa(name)); });
  module.def("num_threads", [] { return megalodon_num_threads(); });
  module.def("set_num_threads", [](int64_t count) { throw_unless_ok(megalodon_set_num_threads(count)); });
  module.def("set_parallel_for",
             [](uintptr_t address) { megalodon_set_parallel_for(reinterpret_cast<megalodon_parallel_for>(address)); });
}

}  // namespace
}  // namespace megalodon::bind
